"""The model that `replication` hands back: one graph of layers, run as a replica on each device.

batch ─► split on the CPU ─┬─► replica 0 on device 0 ─┬─► join ─► outputs, losses, state
                           └─► replica 1 on device 1 ─┘
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from hpcutils.errors import RequestError
from hpcutils.log import LOGGER
from hpcutils.models import replica

CPU = "/device:CPU:0"
OWN_STEPS = ("train_step", "test_step", "predict_step", "compute_loss")

Structure = Any


@dataclass(frozen=True)
class Plan:
    """Where each replica runs and where their outputs meet. Not a layer, so Keras does not track the template twice."""

    template: Any
    devices: tuple[str, ...]
    merge_device: str


class ParallelModel(keras.Model):  # type: ignore[misc]
    """A functional model over the template's own layers that runs a replica on each device.

    Inputs, outputs, output names, layers and variables are the template's own objects.

    Args:
        plan: The template, the devices and the place where outputs are joined.

    Raises:
        RequestError: The template is no graph of layers (a subclassed model), or holds weights outside its graph.
    """

    def __init__(self, plan: Plan) -> None:
        inputs, outputs = graph_of(plan.template)
        super().__init__(inputs=inputs, outputs=outputs, name=f"{plan.template.name}_parallel")
        self.plan = plan
        self.noted = False
        # "auto" means XLA on a GPU, and XLA puts a whole compiled function on one device.
        self.jit_compile = False
        check_same_weights(self, plan.template)

    @property
    def template(self) -> Any:
        """The model that was replicated: it shares every weight, and it is what one saves."""
        return self.plan.template

    def call(self, inputs: Structure, training: bool | None = None, mask: Structure = None) -> Structure:
        """Split the batch, run the replicas, join what they return.

        Args:
            inputs: The template's input structure; axis 0 of every tensor is the batch.
            training: Reaches the template through Keras' call context.
            mask: Keras masks of the inputs, or `None`.

        Returns:
            The template's output structure, all rows in the order of the batch.
        """
        plan = self.plan
        inputs = keras.tree.map_structure(replica.as_tensor, inputs)
        with tf.device(CPU):
            split = replica.split_batch(replica.batch_size(inputs), len(plan.devices))
            rows = [replica.take_rows(inputs, mask, part) for part in split.parts]
        values = replica.read_values(plan.template)
        results, outcomes = [], []
        for index, device in enumerate(plan.devices):
            tensors, outcome = replica.run(plan.template, rows[index], values, device, index)
            values = replica.pass_on(values, outcome)
            results.append(tensors)
            outcomes.append(outcome)
        with tf.device(plan.merge_device), tf.name_scope("join"):
            outputs, losses = replica.join(results, outcomes, split)
            replica.write_state(outcomes, split)
        for loss in losses:
            # A functional model refuses `add_loss`, which it keeps for symbolic tensors.
            keras.layers.Layer.add_loss(self, loss)
        return outputs

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
        """Configure training, as `keras.Model.compile` does, without XLA.

        Raises:
            RequestError: `jit_compile=True`.
        """
        if jit_compile is True:
            raise RequestError(
                "jit_compile=True was asked of a replicated model: XLA puts a compiled function on one device, so all "
                "replicas would run there",
                hint="leave jit_compile out, or compile and train the template itself",
            )
        super().compile(
            optimizer=optimizer,
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=False,
            auto_scale_loss=auto_scale_loss,
        )

    def save(
        self, filepath: Any, overwrite: bool = True, zipped: bool | None = None, include_optimizer: bool | None = None
    ) -> None:
        """Save the template to `filepath`: the file loads on a machine with any number of devices.

        `include_optimizer` is about an `.h5` file and the template's own optimizer, where that was compiled itself.
        """
        self.note_template("save")
        options = {} if include_optimizer is None else {"include_optimizer": include_optimizer}
        self.template.save(filepath, overwrite=overwrite, zipped=zipped, **options)

    def save_weights(self, filepath: Any, overwrite: bool = True, max_shard_size: float | None = None) -> None:
        """Save the template's weights, which are this model's, to `filepath`."""
        self.note_template("save_weights")
        self.template.save_weights(filepath, overwrite=overwrite, max_shard_size=max_shard_size)

    def load_weights(self, filepath: Any, skip_mismatch: bool = False) -> None:
        """Load weights into the template, and so into this model."""
        self.template.load_weights(filepath, skip_mismatch=skip_mismatch)

    def export(
        self,
        filepath: Any,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
    ) -> None:
        """Export the template for serving."""
        self.note_template("export")
        self.template.export(filepath, format=format, verbose=verbose, input_signature=input_signature)

    def to_json(self) -> str:
        """Return the template's configuration as JSON."""
        return str(self.template.to_json())

    def get_config(self) -> dict[str, Any]:
        """Refuse: a configuration that names devices would not load elsewhere.

        Raises:
            RequestError: Always.
        """
        raise RequestError(
            f"the replicated model '{self.name}' has no configuration of its own",
            hint="save it with its own save(), not with keras.saving.save_model; else use the template: parallel.template, or "
            "the model that you gave to multi_gpu_model",
        )

    def note_template(self, method: str) -> None:
        """Say once which model is written: a checkpoint at each epoch would repeat it."""
        if not self.noted:
            self.noted = True
            LOGGER.warning("%s of a replicated model: the template '%s' is written", method, self.template.name)


def graph_of(template: Any) -> tuple[Structure, Structure]:
    """Return the symbolic inputs and outputs of `template`, nested as it was built.

    Raises:
        RequestError: The template is a subclassed model or not built.
    """
    inputs, outputs = getattr(template, "inputs", None), getattr(template, "outputs", None)
    if not inputs or not outputs:
        raise RequestError(
            f"'{template.name}' ({type(template).__name__}) is not a graph of layers, or has no input shape yet",
            hint="wrap it: inputs = keras.Input(shape); model = keras.Model(inputs, your_model(inputs))",
        )
    if isinstance(template, keras.Sequential):
        return inputs[0], outputs[0] if len(outputs) == 1 else outputs
    return template.input, template.output


def check_same_weights(parallel: ParallelModel, template: Any) -> None:
    """Compare the variables, one by one, and say which of the template's own methods are not carried over.

    Raises:
        RequestError: The template holds variables that no layer of its graph owns.
    """
    if [id(v) for v in parallel.variables] != [id(v) for v in template.variables]:
        raise RequestError(
            f"'{template.name}' holds {len(template.variables)} variables and its graph {len(parallel.variables)}, or in "
            "another order",
            hint="make every layer of the model part of the graph from its inputs to its outputs",
        )
    own = [name for name in OWN_STEPS if getattr(type(template), name) is not getattr(keras.Model, name)]
    if own:
        LOGGER.warning("the replicated model does not take over %s of %s", ", ".join(own), type(template).__name__)
