"""`python -m t5tune`, which is what a launcher such as torchrun starts."""

from t5tune.cli import main

if __name__ == "__main__":
    main()
