"""`python -m zoo.train`: what torchrun and accelerate launch."""

if __name__ == "__main__":
    import sys

    from zoo.cli.entry import main

    sys.exit(main(["train", *sys.argv[1:]]))
