"""Entry point of `python -m t5tune`, which launchers such as torchrun start."""

from t5tune.cli import main

if __name__ == "__main__":
    main()
