"""The kinds of stage, one file each: what a stage is given and how that is made from clean video."""
