"""Low-rank adaptation of a quantized layer, whether its kernel is float or packed."""

import keras
from keras import initializers

from keras_bitnet.checks import check_count


class LowRankAdaptation(keras.Layer):
    """Mixin of `BitLayer`: LoRA as a side path, which a packed kernel can take too.

    Source:
        Hu et al. 2021, LoRA (https://arxiv.org/abs/2106.09685).
    """

    lora_enabled: bool = False

    def enable_lora(self, rank, lora_alpha=None, a_initializer="he_uniform", b_initializer="zeros"):
        """Freezes the kernel, float or packed, and adds a trained low-rank product to it.

            y = x @ kernel + (lora_alpha / rank) * (x @ lora_kernel_a) @ lora_kernel_b

        Args:
            rank: Positive integer, the inner size of the added product.
            lora_alpha: Scale of the addition, `rank` by default.
            a_initializer: Initializer of `lora_kernel_a`, `(in_features, rank)`.
            b_initializer: Initializer of `lora_kernel_b`, `(rank, out_features)`.

        Raises:
            ValueError: The rank is no positive integer, or the layer is not built, has LoRA
                already or has a kernel constraint.
        """
        check_count("rank", rank)
        if self.kernel_constraint is not None:
            raise ValueError(
                "LoRA cannot keep a kernel constraint. Remove the `kernel_constraint` argument "
                f"of layer '{self.name}' to enable LoRA."
            )
        if not self.built and self.kernel is None and self.kernel_tiles is None:
            raise ValueError(f"Build layer '{self.name}' before enabling LoRA.")
        if self.lora_enabled:
            raise ValueError(f"LoRA is enabled on layer '{self.name}' already.")
        self._tracker.unlock()
        self.lora_kernel_a = self.add_weight(
            name="lora_kernel_a",
            shape=(self.in_features, rank),
            initializer=initializers.get(a_initializer),
            regularizer=self.kernel_regularizer,
            dtype="float32",
        )
        self.lora_kernel_b = self.add_weight(
            name="lora_kernel_b",
            shape=(rank, self.out_features),
            initializer=initializers.get(b_initializer),
            regularizer=self.kernel_regularizer,
            dtype="float32",
        )
        if self.kernel is not None:
            self.kernel.trainable = False
            if self.kernel_log2_scale is not None:
                self.kernel_log2_scale.trainable = False
        self._tracker.lock()
        self.lora_enabled = True
        self.lora_rank = rank
        self.lora_alpha = lora_alpha if lora_alpha is not None else rank
