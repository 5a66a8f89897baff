"""Lines that are printed while a progress bar is shown."""

from accelerate import Accelerator
from tqdm.auto import tqdm


def print_above_bar(accelerator: Accelerator, text: str) -> None:
    """Prints `text` once, whatever the number of processes and machines, on a line of its own."""
    if accelerator.is_main_process:
        tqdm.write(text)
