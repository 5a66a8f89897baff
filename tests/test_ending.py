"""A run of several processes ends."""

from conftest import ROOT
from processes import run, torchrun

# A process group waits for what is still being sent. Here that comes late, as it may on a busy machine.
ENDS_BEFORE_ITS_LAST_MESSAGE = """
import sys, time
sys.path.insert(0, {root!r})
import torch
from accelerate import Accelerator
from ride_bf.training.ending import end_training

def train():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    accelerator.backward(model(torch.ones(1, 2)).sum())
    received = [torch.zeros(2) for _ in range(2)]
    if accelerator.process_index:
        time.sleep(1)
    sending = torch.distributed.all_gather(received, torch.ones(2), async_op=True)
    if accelerator.process_index:
        sending.wait()
    del received, sending
    end_training(accelerator)

train()
print("ended")
"""


def test_the_model_does_not_wait_for_the_process_group(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(ENDS_BEFORE_ITS_LAST_MESSAGE.format(root=str(ROOT)))
    assert run(*torchrun(2, script), ACCELERATE_USE_CPU="true").count("ended") == 2
