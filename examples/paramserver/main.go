package main

const (
	defaultEpochs   = 12
	defaultBatch    = 48
	defaultRate     = 0.05
	defaultMomentum = 0.9
)

func main() {}
