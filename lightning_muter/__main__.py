"""``python -m lightning_muter``."""

from lightning_muter.lightning.cli import main

if __name__ == "__main__":
    main()
