"""Folders of models and adapters: merged and proven tensor by tensor, without loading a model."""
