"""`python -m caltech_hpo.cli`: the same as `caltech-hpo`."""

from caltech_hpo.cli import main

if __name__ == "__main__":
    main()
