"""Which kernels the backward pass launches."""

from unittest import mock

from triton_attn.dense import backward


class Launches(list):
    """Names of the kernels that the backward pass launches."""

    def __enter__(self):
        def launch(kernel, *args, **kwargs):
            self.append(kernel.__name__.removeprefix("_flash_bwd_").removesuffix("_kernel"))
            return original(kernel, *args, **kwargs)

        original = backward.launch
        self.patch = mock.patch.object(backward, "launch", launch)
        self.patch.start()
        return self

    def __exit__(self, *exception):
        self.patch.stop()
