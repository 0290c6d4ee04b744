"""Images in: decoding, transforms, and the encoders that turn pixels into image tokens. One line per component."""

from zoo.registry import declare

declare("vision", "hf", "zoo.vision.hf_tower")
declare("vision", "open_clip", "zoo.vision.open_clip_tower")
declare("vision", "timm", "zoo.vision.timm_tower")
