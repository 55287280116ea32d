"""The reference of every public function, under its public name: the same arguments, the same result, plain torch."""

from .flash.reference import flash_attention, flash_attention_varlen

__all__ = ["flash_attention", "flash_attention_varlen"]
