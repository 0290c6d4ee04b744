"""`python -m zoo.train`, for torchrun and accelerate."""

from zoo.moved import attributes_of

__getattr__ = attributes_of("zoo.training.loop")

if __name__ == "__main__":
    import sys

    from zoo.cli.entry import main

    sys.exit(main(["train", *sys.argv[1:]]))
