"""`python -m minirl.plots`."""

from minirl.plots import main

if __name__ == "__main__":
    main()
