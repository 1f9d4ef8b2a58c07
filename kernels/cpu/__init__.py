"""CPU paths of the ops: ATen and MKL on blocks of dequantized weight that stay in cache."""
