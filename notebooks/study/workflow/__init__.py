"""Commands on top of Snakemake, and the pages that they publish."""
