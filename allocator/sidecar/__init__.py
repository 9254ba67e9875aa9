"""The allocation sidecar: an HTTP service over a store of scores, banks and manifests, and its one-page console."""
