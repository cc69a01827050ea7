"""`python -m peft_ncgeo.cli`, also under `accelerate launch -m`."""

from . import main

if __name__ == "__main__":
    main()
