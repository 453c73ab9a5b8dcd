"""The former name of `megashear train`, with the same options.

torchrun --nproc-per-node 8 examples/pretrain_shear.py --config RUN.yaml
"""

from megashear.cli import main

if __name__ == "__main__":
    main("train")
