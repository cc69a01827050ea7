"""Packages of the distribution: those of `peft_ncgeo`, and the recipes, which stay beside the examples."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["peft_ncgeo", "peft_ncgeo.*"]), "peft_ncgeo.recipes"])
