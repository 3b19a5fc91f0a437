"""What people run: training the embedded model, golden files, benchmarks."""
