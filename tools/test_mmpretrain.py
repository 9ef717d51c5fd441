#!/usr/bin/env python
"""Run MMPretrain's own tools/test.py, with the plugins registered and the config checked first.

tools/test_mmpretrain.py CONFIG CHECKPOINT
"""

from mm_plugins.command_line import run

if __name__ == "__main__":
    run("test", "mmpretrain")
