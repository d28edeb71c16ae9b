"""Networks only: backbones from timm, heads, momentum copies."""
