"""`together.py` with accelerate's FSDP2 on CPU processes: `test_processes.py` starts it.

torch shards over CPUs as it does over GPUs. Only accelerate and this project's launch check ask for GPUs, so
both are patched here.
"""

import os
import sys
from pathlib import Path

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

import together
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import distributed

from pipeline.distributed import processes
from pipeline.distributed.processes import destroy_process_group

distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState()
processes.launch_problem = lambda *_: None
together.main(Path(sys.argv[1]), *sys.argv[2:])
destroy_process_group()
