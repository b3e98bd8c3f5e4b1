"""`python -m minirl.evaluate`: environment workers do not load a main module of this name, and so no torch."""

from minirl.evaluate import main

if __name__ == "__main__":
    main()
