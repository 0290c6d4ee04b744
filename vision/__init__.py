"""Images in: decoding, transforms, and the encoders that turn pixels into image tokens. One line per component."""

from zoo.registry import declare

declare("vision", "fused", "zoo.vision.encoders.fused")
declare("vision", "hf", "zoo.vision.encoders.hf")
declare("vision", "open_clip", "zoo.vision.encoders.open_clip")
declare("vision", "qwen_vision", "zoo.vision.encoders.qwen")
declare("vision", "timm", "zoo.vision.encoders.timm")
