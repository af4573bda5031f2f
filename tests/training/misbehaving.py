"""pretrain.py whose rank 1 misbehaves in step 3: `python misbehaving.py sleep|raise CONFIG ...`."""

import sys
import time

import pretrain
from megatron_ext.launch import launched_as


def misbehave(kind: str) -> None:
    from megatron_ext.training import loop

    train_step = loop.train_step

    def step(done, *arguments, **options):
        if done == 2:
            if kind == "sleep":
                time.sleep(600)
            raise ValueError("the third step is beyond rank 1")
        return train_step(done, *arguments, **options)

    loop.train_step = step


if __name__ == "__main__":
    if launched_as()[0] == 1:
        misbehave(sys.argv[1])
    sys.exit(pretrain.main(sys.argv[2:]))
