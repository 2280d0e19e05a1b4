"""`python -m alignkit`, which is also what `accelerate launch -m alignkit` runs."""

from alignkit.cli import main

if __name__ == "__main__":
    main()
