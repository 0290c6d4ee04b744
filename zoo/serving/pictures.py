"""Images of requests: from data URLs, and from hosts that are allowed, within bounds on bytes and pixels."""

import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any

from zoo.registry import ZooError
from zoo.serving.hosts import host_named, names_of
from zoo.serving.protocol import Picture, RequestError
from zoo.vision.images.decode import data_url_bytes, open_image

SECONDS = 10  # without an answer, after which a host is given up


class Pictures:
    """Takes the images of requests.

    Args:
        most: images of one request.
        max_bytes: of an encoded image.
        max_pixels: of a decoded one.
        hosts: names from which http and https URLs are fetched, as `images.example.org` for the port of the scheme or
            `images.example.org:8080`; none by default.
    """

    def __init__(self, most: int, max_bytes: int, max_pixels: int, hosts: Sequence[str] = ()) -> None:
        self.most, self.max_bytes, self.max_pixels = most, max_bytes, max_pixels
        self.hosts = frozenset(map(host_named, hosts))

    def take(self, pictures: Sequence[Picture], processor: Any) -> list[Any]:
        """Decode images one after the other, and prepare them as the encoder takes them.

        Raises:
            RequestError: there are too many, one is too large or broken, or its URL is not one of data.
        """
        if len(pictures) > self.most:
            raise RequestError(
                f"The request has {len(pictures)} images; at most {self.most} are taken.", param="messages"
            )
        several = len(pictures) > 1
        prepared = []
        for picture in pictures:
            try:
                encoded = self._bytes(picture)
                image = open_image(encoded, picture.where, max_pixels=self.max_pixels)
                prepared.append(processor.pixels_of(image, several, where=picture.where))
            except RequestError:
                raise
            except ZooError as error:
                raise RequestError(str(error), code="invalid_image", param=picture.where) from error
        return prepared

    def _bytes(self, picture: Picture) -> bytes:
        scheme = picture.url.partition(":")[0].lower()
        if scheme == "data":
            if len(picture.url) > self.max_bytes * 4 // 3 + 1024:  # before it is decoded
                raise self._too_large(picture)
            try:
                encoded = data_url_bytes(picture.url)
            except ValueError as error:
                why = f"{picture.where}: the data URL cannot be decoded: {error}."
                raise RequestError(why, code="invalid_base64_image", param=picture.where) from error
        elif scheme in ("http", "https"):
            encoded = self._fetched(picture)
        else:
            raise RequestError(
                f"{picture.where}: images come as data URLs (data:image/png;base64,...), and {picture.url[:40]!r} is "
                "something else. No file is read.",
                code="invalid_image_url",
                param=picture.where,
            )
        if len(encoded) > self.max_bytes:
            raise self._too_large(picture)
        return encoded

    def _too_large(self, picture: Picture) -> RequestError:
        return RequestError(
            f"{picture.where} has more than {self.max_bytes} bytes.", code="image_too_large", param=picture.where
        )

    def _fetched(self, picture: Picture) -> bytes:
        """Fetch an image from one of the allowed hosts. Redirects are not followed: they may lead to another host."""
        if not self.hosts & names_of(picture.url):
            raise RequestError(
                f"{picture.where}: {picture.url[:80]!r} is not fetched: send the image as a data URL, or start the "
                "server with fetch=<host>.",
                code="invalid_image_url",
                param=picture.where,
            )
        opener = urllib.request.build_opener(_NoRedirects)
        request = urllib.request.Request(picture.url, headers={"User-Agent": "zoo-serve"})
        try:
            with opener.open(request, timeout=SECONDS) as answer:
                return answer.read(self.max_bytes + 1)
        except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
            why = f"{picture.where}: {picture.url[:80]!r} cannot be fetched: {error}"
            raise RequestError(why, code="invalid_image_url", param=picture.where) from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None
