"""Batches of a stage, made from samples in the order of `zoo.runs.order`, by this process or by loader workers.

Streaming data sets, whose length is not known, are read in order by one thread of each process, which sends rows to the
loader workers. If the order allows, a process reads only the shards that hold its rows (`zoo.data.stream_order`). The
state of a stream is saved in checkpoints.
"""

import os
import pickle
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import RawValue
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from zoo.data.stream_order import StreamOrder, StreamRow, order_of
from zoo.registry import RecordError, Sample, ZooError, naming, placed, sample_or_error
from zoo.runs.dealing import IMAGE, cost_of, deal, require_even
from zoo.runs.lengths import Room
from zoo.runs.order import Mix, ShardPosition, Where, keyed
from zoo.settings.stage import Stage
from zoo.text.batch import EncodedSample

Item = Where | tuple[int, StreamRow]  # a sample: its (data set, epoch, index), or data set and row of a stream
WINDOW = 32  # steps whose samples are sorted by length together

Place = ShardPosition  # its earlier name, which scripts import


class Batches(Dataset):
    """Maps forward pass j of this process to its batch: a function of j alone, except for streams.

    Without `text` a batch holds only images and dense targets, for stages in which the LLM does not run. A batch is
    None if all its samples are broken and `skip_broken` leaves them out; `info` lists them.
    """

    def __init__(
        self,
        mix: Mix,
        processor: Any,
        stage: Stage,
        steps: int,
        place: ShardPosition,
        *,
        multiple_of: int = 1,
        text: bool = True,
        teacher: Any = None,
        room: Room | None = None,
        recall: Callable[[Sample], list[Any]] | None = None,
        image_cost: float = IMAGE,
    ) -> None:
        self.mix, self.processor, self.stage, self.steps, self.place = mix, processor, stage, steps, place
        self.multiple_of, self.text = multiple_of, text
        self.room = room or Room()  # for a row; longer ones are refused or cut
        self.recall = recall  # prepares images, those without pixels whose features are kept; None: the processor does
        self.teacher = teacher  # `TeacherRows` or `TeacherStore`: adds the teacher's rows or outputs to each row
        parts = require_even(stage, place.world)
        mix.require_lengths(stage)
        self.image_cost = image_cost  # in tokens, for `balance`
        layout = getattr(
            processor, "layout", None
        )  # where images keep their shapes, their tokens are known by their sizes
        self.share = processor.pictures.share_of if layout is not None and layout.native else None
        self._dealt: tuple[int, list[Where]] = (-1, [])  # a step, and its samples in the order of processes and passes
        self.size = stage.batch_size // parts  # samples of one forward pass
        self._window: tuple[int, list[list[Where]]] = (-1, [])
        self.has_streams = None in mix.lengths
        self._streams: dict[int, StreamOrder] = {}  # data set -> its reader
        self._step: tuple[int, dict[int, Item]] = (place.step - 1, {})  # last step read from streams, slot -> item

    def __len__(self) -> int:
        return self.steps * self.stage.accumulate

    def __getitem__(self, j: int) -> dict[str, Any]:
        return self.make(*self.read(j))

    def read(self, j: int) -> tuple[list[Item], dict[str, Any]]:
        """Return the items of pass j, and the state of the streams after it. Reads rows of streams, in order."""
        step, turn = divmod(j, self.stage.accumulate)
        # Consecutive slots for consecutive processes: while world * accumulate stays the same, so do the batches.
        first = (turn * self.place.world + self.place.rank) * self.size
        return self._items(step, range(first, first + self.size)), self._stream_places()

    def make(self, items: list[Item], streams: dict[str, Any]) -> dict[str, Any]:
        """Make a batch of the items of `read`, in any process."""
        encode = self.processor.encode if self.text else self.processor.encode_images
        rows: list[EncodedSample] = []
        broken: list[dict[str, str]] = []
        for item in items:
            try:
                rows += self._rows(self._sample(item), encode)
            except RecordError as error:
                if not self.stage.skip_broken:
                    raise
                broken.append(error.line())
        if self.stage.pack_length is not None and self.text and rows:
            rows = self.processor.pack(rows, self.stage.pack_length)
        batch = self.processor.collate(rows, multiple_of=self.multiple_of) if rows else None
        info = {"samples": len(items) - len(broken), "broken": broken, "streams": streams}
        return {"batch": batch, "info": info}

    def _rows(self, sample: Sample | RecordError, encode: Any) -> list[EncodedSample]:
        """Encode a sample.

        Raises:
            RecordError: it cannot be read or encoded.
        """
        if isinstance(sample, RecordError):
            raise sample
        with naming(sample.data, sample.where, sample.id, "text"):
            pieces = pieces_of(sample, self.stage) if self.text else [sample]
            images = () if self.recall is None else (self.recall(sample),)
            encoded = [self.room.fit(encode(s, *images)) if self.text else encode(s, *images) for s in pieces]
            return encoded if self.teacher is None else self.teacher.add(sample, pieces, encoded)

    def samples(self, step: int) -> list[Sample | RecordError]:
        """Return the samples of an optimiser step, with one process; errors for broken ones."""
        return [self._sample(item) for item in self._items(step, range(self.stage.batch_size))]

    def _sample(self, item: Item) -> Sample | RecordError:
        if len(item) == 3:
            return self.mix.read(*item)
        name, dataset, row = self.mix.names[item[0]], self.mix.datasets[item[0]], item[1]
        if row.number is None:
            return placed(row.value, name, "a stream")
        return sample_or_error(name, dataset.place(row.number), lambda: dataset.sample(row.value, row.number))

    def _places(self, step: int) -> list[Where]:
        """Return the samples of optimiser step `step`, as (data set, epoch, index)."""
        size = self.stage.batch_size
        if not self.stage.length_buckets:
            return self.mix.places(step * size, (step + 1) * size)
        # Sorting within windows, aligned at multiples of WINDOW steps, keeps a step a function of its number: a resumed
        # run sorts its window again. The steps of a window are shuffled, else lengths would rise within each window.
        window = step // WINDOW
        if self._window[0] != window:
            places = self.mix.places(window * WINDOW * size, min((window + 1) * WINDOW, self.steps) * size)
            # From the text, not the encoded row: encoding a window would take as long as its steps.
            image = IMAGE if self.share is None else float(self.processor.num_image_tokens)
            lengths = [cost_of(self.mix.read(*where), image, self.share) for where in places]
            ranked = np.argsort(lengths, kind="stable").reshape(-1, size)
            shuffled = ranked[keyed(self.mix.seed, 2, window).permutation(len(ranked))]
            self._window = (window, [[places[i] for i in row] for row in shuffled.tolist()])
        return self._window[1][step - window * WINDOW]

    def _in_parts(self, step: int) -> list[Where]:
        """Return the samples of a step in the order of its slots; with `balance`, dealt to them by cost."""
        if not self.stage.balance:
            return self._places(step)
        if self._dealt[0] != step:
            places = self._places(step)
            costs = np.array([cost_of(self.mix.read(*where), self.image_cost, self.share) for where in places])
            order = deal(costs, len(places) // self.size)
            self._dealt = (step, [places[i] for i in order.tolist()])
        return self._dealt[1]

    # ---- streams -----------------------------------------------------------------------------------------------

    def _items(self, step: int, slots: range) -> list[Item]:
        """Return the items at `slots` of an optimiser step, all of which this process computes."""
        if not self.has_streams:
            return list(self._in_parts(step)[slots.start : slots.stop])
        if step < self._step[0]:  # streams cannot go back: read again from the checkpoint's state
            self._streams, self._step = {}, (self.place.step - 1, {})
        while self._step[0] < step:
            number = self._step[0] + 1
            self._step = (number, self._read(number, number == step))
        return [self._step[1][slot] for slot in slots]

    def _read(self, step: int, wanted: bool) -> dict[int, Item]:
        """Advance all streams by a step; read this process's rows of it if they are wanted."""
        items: dict[int, Item] = {}
        first = step * self.stage.batch_size
        for slot, place in enumerate(self.mix.places(first, first + self.stage.batch_size)):
            # Streams advance by every slot, in all processes, so that their states agree; rows are read for own slots.
            mine = wanted and slot // self.size % self.place.world == self.place.rank
            if self.mix.lengths[place[0]] is not None:
                items[slot] = place
            elif (row := self._stream(place[0]).next(first + slot, mine)) is not None:
                items[slot] = (place[0], row)
        return items

    def _stream(self, member: int) -> StreamOrder:
        if member not in self._streams:
            name = self.mix.names[member]
            place = self.place.streams.get(name)
            self._streams[member] = order_of(name, self.mix.datasets[member], self.stage.batch_size, place)
        return self._streams[member]

    def _stream_places(self) -> dict[str, Any]:
        return self.place.streams | {self.mix.names[m]: order.place for m, order in self._streams.items()}


def pieces_of(sample: Sample, stage: Stage) -> list[Sample]:
    """Divide a sample into the rows of a stage: with `pack=none` one for each dialog."""
    if stage.pack == "dialogs" or len(sample.dialogs) == 1:
        return [sample]
    return [replace(sample, dialogs=[d]) for d in sample.dialogs]


class _Making(Dataset):
    """Makes batches in a loader worker; rows of streams arrive pickled.

    DataLoader turns an exception of a worker into text with a traceback, so errors are returned instead of raised.
    """

    def __init__(self, batches: Batches, streams: bool) -> None:
        self.batches, self.streams = batches, streams

    def __getitem__(self, what: Any) -> dict[str, Any] | ZooError:
        try:
            if not self.streams:
                return self.batches[what]
            read = pickle.loads(what)
            return read if isinstance(read, ZooError) else self.batches.make(*read)
        except ZooError as error:
            return error


class Loader:
    """Iterates over the batches of this process, read ahead by a thread or by worker processes.

    Several processes must run the same number of passes: an item whose batch is None has another one, as `spare`.
    """

    def __init__(self, batches: Batches, *, ahead: int = 3, pin_memory: bool = False) -> None:
        self.batches, self.ahead, self.pin_memory = batches, ahead, pin_memory
        self.waited = 0.0  # seconds that the consumer has waited for batches

    def __iter__(self) -> Generator[dict[str, Any], None, None]:
        first = self.batches.place.step * self.batches.stage.accumulate
        turns = range(first, len(self.batches))
        batches = self.batches
        # One thread is faster for small images: workers pay for pickling and copying batches.
        if batches.stage.workers:
            source = self._by_workers(turns)
        else:
            source = _ahead((batches[j] for j in turns), self.ahead)
        items = _with_spares(source) if batches.place.world > 1 else source
        try:
            while True:
                start = time.perf_counter()
                item = next(items, None)
                self.waited += time.perf_counter() - start
                if item is None:
                    return
                yield item
        finally:
            source.close()

    def _by_workers(self, turns: range) -> Generator[dict[str, Any], None, None]:
        batches, workers = self.batches, self.batches.stage.workers
        streams = batches.has_streams
        # The thread that reads streams begins when the loader asks for its first message, with all workers forked.
        feed = _ahead(_messages(batches, turns), self.ahead * workers) if streams else None
        ending = RawValue("b", 0)
        loader = DataLoader(
            _Making(batches, streams),
            sampler=feed or turns,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.ahead,
            pin_memory=self.pin_memory,
            worker_init_fn=partial(_outlast_sigterm, ending),
        )
        with torch.random.fork_rng(devices=[]):  # the iterator draws a seed from torch's global generator
            source = iter(loader)
        try:
            for item in source:
                if isinstance(item, ZooError):
                    raise item
                yield item
        finally:
            # The traceback of an error holds this frame. A collector that finds both ends torch's queues to the workers
            # first, and the workers, which then do not learn that they are to end, are waited for 5 seconds each.
            ending.value = 1
            del source
            if feed is not None:
                feed.close()


def _outlast_sigterm(ending: Any, worker: int) -> None:
    """Let a worker go on at SIGTERM until the loader ends it, by `ending`.

    Schedulers send the signal to all processes of a job, and a run whose workers end at once cannot take its last step.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.value else None)


def _with_spares(source: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Add to items whose batch is None a `spare`: the previous batch, or the next one if there is none before."""
    ahead: deque[dict[str, Any]] = deque()
    spare = None
    while (item := ahead.popleft() if ahead else next(source, None)) is not None:
        if item["batch"] is not None:
            spare = item["batch"]
        elif spare is None:
            spare = next((i["batch"] for i in ahead if i["batch"] is not None), None)
            while spare is None and (later := next(source, None)) is not None:
                ahead.append(later)
                spare = later["batch"]
            if spare is None:
                raise ZooError(f"Every sample of this process is broken, the first: {item['info']['broken'][0]}")
        yield {**item, "spare": spare}


def _messages(batches: Batches, turns: Iterable[int]) -> Iterator[bytes]:
    """Read passes and pickle them for the workers; errors are sent in order, behind the batches before them."""
    try:
        for j in turns:
            read = batches.read(j)
            try:
                message = pickle.dumps(read)
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                lengths = zip(batches.mix.names, batches.mix.lengths, strict=True)
                names = ", ".join(name for name, length in lengths if length is None)
                reason = f"The samples of data {names}, a stream, cannot be sent to a loader worker ({error})"
                raise ZooError(f"{reason}: set workers=0.") from error
            yield message
    except ZooError as error:
        yield pickle.dumps(error)


def _ahead(items: Iterable[Any], ahead: int) -> Generator[Any, None, None]:
    """Make items in a thread. Most of the work of a step releases Python's lock, and the thread uses the gaps."""
    ready: queue.Queue = queue.Queue(maxsize=ahead)
    leave = threading.Event()

    def put(item: Any) -> bool:
        while not leave.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="zoo-loader")
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        leave.set()
        thread.join(timeout=10)
