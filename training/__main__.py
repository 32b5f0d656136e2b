"""`python -m training` is `masknet`: the form that torchrun starts."""

from training.cli import main

if __name__ == "__main__":
    main()
