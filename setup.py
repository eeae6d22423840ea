"""Build entry point: everything is declared in pyproject.toml; hooks for the optional native module go here."""

from setuptools import setup

setup()
