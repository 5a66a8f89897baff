"""Train a long-tailed image classifier: `accelerate launch train_accelerate.py [--recipe NAME] [--OPTION VALUE ...]`.

Without arguments it trains the default recipe on images that come with scikit-learn. `--help` lists every option.
The output folder gets `recipe.json` and `run.json`; `metrics.jsonl`, a line for each evaluation and epoch; TensorBoard
scalars; the checkpoints `last` and `best`, each a Hugging Face folder; and `test_results.json`. SIGTERM, SIGUSR1 and
Ctrl-C save a checkpoint and end the run with exit code 75; `--resume` continues the run as if nothing had happened.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ride_bf.training.arguments import parse_arguments

if __name__ == "__main__":
    parse_arguments()  # answers --help and a misspelt option before the import of torch, which takes seconds

from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from data import BrokenImageError
from ride_bf.command_line.messages import dead_workers_as_messages, errors_as_messages
from ride_bf.evaluation.predict import evaluate
from ride_bf.evaluation.tables import accuracy_table, shot_summary
from ride_bf.methods.windows import set_windows
from ride_bf.runs.checkpoints import BEST, LAST, CheckpointError, read_facts, save_model, save_training_state
from ride_bf.runs.models import load_model
from ride_bf.runs.provenance import DATA, PARAMETERS
from ride_bf.runs.run_folder import TEST_RESULTS, RunFolder, log_metrics, read_broken_images
from ride_bf.training.clock import TrainingClock
from ride_bf.training.ending import end_training
from ride_bf.training.freezing import parameter_counts, set_train_mode
from ride_bf.training.interruption import EXIT_CODE, Interruption
from ride_bf.training.loss_monitor import LossMonitor
from ride_bf.training.printing import print_above_bar
from ride_bf.training.setup import TrainingParts, set_up


@dataclass(kw_only=True)
class Trainer(TrainingParts):
    """Trains a run, evaluates and saves it on the way, and tests the checkpoint that it chooses."""

    interruption: Interruption
    # for the current epoch
    monitor: LossMonitor = field(init=False)
    clock: TrainingClock = field(init=False)
    bar: tqdm = field(init=False)

    def train(self) -> None:
        """Trains to the end and tests. A run that is asked to stop raises SystemExit with `EXIT_CODE`."""
        while not self.finished():
            self.train_epoch()
        self.test()
        end_training(self.accelerator)
        self.publisher.after_training()

    def finished(self) -> bool:
        progress, patience = self.progress, self.run.early_stopping_patience
        return (
            progress.epochs_done >= self.recipe.epochs
            or (self.run.max_steps is not None and progress.steps_done >= self.run.max_steps)
            or (patience is not None and progress.evaluations_without_gain >= patience)
        )

    def train_epoch(self) -> None:
        """Trains from the current batch to the end of the epoch or of the run."""
        progress, batches = self.progress, self.loaders["train"]
        epoch, first = progress.epochs_done, progress.batches_done
        batches.set_epoch(epoch)
        set_windows(self.accelerator.unwrap_model(self.model), self.recipe, epoch)
        self.monitor = LossMonitor(
            self.accelerator, self.folder.path, batches.describe, progress.loss_sums, batches=first
        )
        self.clock = TrainingClock(first)
        set_train_mode(self.model)
        self.bar = tqdm(
            total=len(batches),
            initial=first,
            desc=f"epoch {epoch + 1}",
            leave=False,
            mininterval=1.0,
            disable=not self.accelerator.is_local_main_process,
        )
        for batch in batches.batches_from(first):
            loss = self.step(batch)
            self.monitor.add(loss, batch)
            progress.batches_done += 1
            self.bar.update()
            if self.accelerator.sync_gradients:
                self.after_step()
                if self.finished():
                    break
        if progress.epochs_done == epoch and not self.finished():  # the last batch had no image that could be read
            progress.batches_done = len(batches)
            if not self.accelerator.sync_gradients:
                self.accelerator.sync_gradients = True  # an epoch ends with a step
                self.update()
            self.after_step()
        self.bar.close()

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """Runs one batch forward and backward. Steps the optimizer once enough batches are accumulated."""
        with self.accelerator.accumulate(self.model):
            outputs = self.model(batch["pixel_values"])
            self.collapse.add(outputs.expert_features)
            loss = self.objective(outputs, batch, reweight=self.recipe.reweight(self.progress.epochs_done))
            self.accelerator.backward(loss)
            self.update()
        return loss

    def update(self) -> None:
        """Updates the weights. Accelerate's optimizer does nothing while gradients are accumulated."""
        self.clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.weights.update()
            self.schedule.after_update()
            self.progress.steps_done += 1

    def after_step(self) -> None:
        """Reads the loss, evaluates, logs, saves and stops the run, each when it is due.

        Raises FloatingPointError if the loss is not finite, SystemExit for a run that stops.
        """
        progress, run = self.progress, self.run
        epoch, step = progress.epochs_done + 1, progress.steps_done
        rate = self.schedule.rate
        epoch_ends = progress.batches_done == len(self.loaders["train"])
        evaluates = epoch_ends or self.is_due(run.eval_steps) or step == run.max_steps
        saves = epoch_ends or self.is_due(run.save_steps)
        reads = evaluates or saves or self.is_due(run.logging_steps)
        received = self.interruption.agreed(self.accelerator, step)
        if reads or received:
            self.log_loss(rate)
        metrics = self.epoch_metrics(epoch, rate) if epoch_ends else {}
        if epoch_ends:
            self.schedule.after_epoch()
            progress.epochs_done, progress.batches_done = epoch, 0
        if evaluates and "validation" in self.loaders:
            metrics |= self.evaluate()
        ends = self.finished()  # early stopping looks at the evaluation
        if ends and not epoch_ends:
            metrics = self.epoch_metrics(epoch, rate) | metrics
        if metrics:
            self.log(metrics)
        if saves or ends or received:
            self.save()
        if epoch_ends:
            self.publisher.after_epoch(progress.epochs_done)
        if received and not ends:
            self.stop(received.name)

    def is_due(self, interval: int | None) -> bool:
        return interval is not None and self.progress.steps_done % interval == 0

    def log_loss(self, rate: float) -> None:
        """Waits for the device and gives the mean loss since the last call to the trackers and the progress bar."""
        loss = self.monitor.read(self.progress.steps_done, rate)
        if loss is not None:
            values = {"loss": loss, "learning_rate": rate, **self.collapse.read()}
            self.accelerator.log(values, step=self.progress.steps_done)
            self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.3g}")

    def epoch_metrics(self, epoch: int, rate: float) -> dict[str, Any]:
        """Training loss, learning rate and speed of an epoch, or of its part if the run ends within it."""
        self.progress.seconds += self.clock.lap()
        seconds, batches = self.clock.seconds, self.progress.batches_done - self.clock.first_batch
        images = batches * self.recipe.batch_size / self.recipe.gradient_accumulation_steps
        return {
            "epoch": epoch,
            "train_loss": self.monitor.mean(),
            "learning_rate": rate,
            "images_per_second": images / seconds,
            "seconds": seconds,
            **self.collapse.latest(),
        }

    def evaluate(self) -> dict[str, Any]:
        """Evaluates on the validation images, all processes the same network, and saves `best` if it is the best."""
        progress = self.progress
        progress.seconds += self.clock.lap()
        with self.statistics.averaged():
            network = self.weights.evaluated
            metrics = evaluate(network, self.loaders["validation"], self.accelerator, self.class_counts)
            accuracy, best = metrics["balanced_accuracy"], progress.best.get("balanced_accuracy", -1.0)
            progress.evaluations_without_gain = 0 if accuracy > best else progress.evaluations_without_gain + 1
            if accuracy >= best:  # if equal, the later one: it has trained longer
                progress.best = {**self.facts(), "balanced_accuracy": accuracy}
                whole = self.weights.whole(network)
                save_model(self.folder.path / BEST, self.accelerator, whole, self.processor, progress.best)
        set_train_mode(self.model)
        self.clock.start()
        return {f"validation_{name}": value for name, value in metrics.items()}

    def log(self, metrics: dict[str, Any]) -> None:
        """Writes a line to metrics.jsonl and to the terminal; numbers go to the trackers too."""
        step = self.progress.steps_done
        if self.accelerator.is_main_process:
            log_metrics(self.folder.path, step, metrics)
        self.accelerator.log({name: value for name, value in metrics.items() if isinstance(value, float)}, step=step)
        words = f"step {step}"
        if "epoch" in metrics:
            width = len(str(self.recipe.epochs))
            words = f"epoch {metrics['epoch']:>{width}}/{self.recipe.epochs}  loss {metrics['train_loss']:.3f}"
        validation = {name.removeprefix("validation_"): value for name, value in metrics.items() if "_accuracy" in name}
        print_above_bar(self.accelerator, words + (f"  validation: {shot_summary(validation)}" if validation else ""))

    def facts(self) -> dict[str, Any]:
        """What `checkpoint.json` says: epochs (2.5 is the middle of the third), steps, parameters and training data."""
        progress = self.progress
        share = round(progress.batches_done / len(self.loaders["train"]), 3)
        return {
            "epoch": progress.epochs_done + share if share else progress.epochs_done,
            "step": progress.steps_done,
            PARAMETERS: parameter_counts(self.model),
            DATA: self.data.as_dict(),
        }

    def save(self) -> None:
        """Saves the checkpoint `last`, from which `--resume` continues."""
        progress = self.progress
        progress.seconds += self.clock.lap()
        progress.loss_sums = self.monitor.sums() if progress.batches_done else [0.0]
        progress.running_statistics = self.statistics.gather()
        with self.statistics.averaged():
            save_training_state(
                self.folder.path,
                self.accelerator,
                self.weights.whole(self.weights.evaluated),
                self.processor,
                self.facts(),
                self.run.keep_last,
            )
        self.clock.start()

    def stop(self, signal_name: str) -> None:
        """Ends a run that was asked to stop, after its checkpoint is saved. Raises SystemExit with `EXIT_CODE`."""
        stopped = f"\n{signal_name}: stopped after step {self.progress.steps_done}; the checkpoint is "
        stopped += f"{self.folder.path / LAST}. The same command with --resume continues the run"
        print_above_bar(self.accelerator, stopped)
        end_training(self.accelerator)
        raise SystemExit(EXIT_CODE)

    def test(self) -> None:
        """Evaluates the chosen checkpoint on the test images, prints the report and writes `test_results.json`."""
        output_dir, counts, names = self.folder.path, self.class_counts, self.class_names
        chosen = BEST if "validation" in self.loaders else LAST
        model = load_model(output_dir / chosen)
        model = self.accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
        facts = read_facts(output_dir / chosen)
        results = {
            "recipe": self.recipe.name,
            "seed": self.run.seed,
            "checkpoint": chosen,
            "epoch": facts["epoch"],
            "step": facts["step"],
            "class_names": names,
            "train_class_counts": counts,
            "test": evaluate(model, self.loaders["test"], self.accelerator, counts),
        }
        if broken := read_broken_images(output_dir):
            results["broken_images"] = broken
            left_out = f"\n{len(broken)} images could not be read and were left out, the first: {broken[0]}"
            self.accelerator.print(left_out)
        if self.accelerator.is_main_process:
            (output_dir / TEST_RESULTS).write_text(json.dumps(results, indent=2) + "\n")
        self.accelerator.print(f"\nTest images, checkpoint '{chosen}' (epoch {results['epoch']}):")
        self.accelerator.print(accuracy_table(results["test"], counts, names))
        steps, size, seconds = self.progress.steps_done, self.recipe.batch_size, self.progress.seconds
        self.accelerator.print(
            f"\n{steps:,} steps of {size} images in {seconds / 60:.1f} minutes of training, "
            f"{steps * size / max(seconds, 1e-9):,.0f} images/s\nThe trained model: {output_dir / chosen}"
        )


def main() -> None:
    run, recipe = parse_arguments()
    if run.print_recipe:
        print(recipe.as_json())
        return
    logging.disable_progress_bar()  # its bars for saved files would hide the run's own
    with (
        Interruption() as interruption,
        RunFolder(Path(run.output_dir)) as folder,
        errors_as_messages(BrokenImageError, FloatingPointError),
        errors_as_messages(CheckpointError, go_on=folder.how_to_go_on),
        dead_workers_as_messages(folder.how_to_go_on),
    ):
        with errors_as_messages():
            parts = set_up(run, recipe, folder)
        if parts is not None:
            Trainer(**parts, interruption=interruption).train()


if __name__ == "__main__":
    main()
