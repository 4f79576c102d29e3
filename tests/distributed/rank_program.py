"""What each rank runs; `JOB` is given by whoever starts it, see `run_on_ranks`."""

import gc
import importlib.util
import os
import pickle
import sys
from datetime import timedelta
from pathlib import Path


def run_rank(file, function, arguments, folder, rank, device, world_size, port):
    output = os.open(Path(folder) / f"{rank}.output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch
    import transformers
    from torch import distributed
    from torch.utils._pytree import tree_map

    torch.set_num_threads(1)
    transformers.set_seed(0)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=300))
    if device != "cpu":
        from accelerate import PartialState
        from another_device.device import register

        own = torch.device(register().type, rank % torch.accelerator.device_count())
        torch.accelerator.set_device_index(own)
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(own)
        PartialState(cpu=True)  # processes as those of CPUs are: Accelerate knows no such device
    name = Path(file).stem
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    gc.freeze()  # the Trainer collects garbage whenever it starts: not among the libraries
    result = getattr(module, function)(*pickle.loads(arguments))
    result = tree_map(lambda one: one.cpu() if isinstance(one, torch.Tensor) else one, result)
    distributed.barrier()
    distributed.destroy_process_group()
    (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(result))


if __name__ == "__rank__":
    run_rank(**globals()["JOB"])
