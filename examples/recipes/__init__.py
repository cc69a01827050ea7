"""Training recipes as YAML files; in an installed package, `peft_ncgeo.recipes`."""
