"""Tests of README, the pages in docs, and the site made of them."""
