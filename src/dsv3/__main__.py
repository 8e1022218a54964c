"""`python -m dsv3`: the command line under `torchrun`."""

from dsv3.cli.main import main

if __name__ == "__main__":
    main()
