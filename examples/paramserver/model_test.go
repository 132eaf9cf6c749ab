package main

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"
)

func TestLoadDigits(t *testing.T) {
	train, heldOut, err := loadDigits()
	if err != nil {
		t.Fatal(err)
	}
	if len(train) != 1438 || len(heldOut) != 359 {
		t.Fatalf("split is %d + %d, want 1438 + 359", len(train), len(heldOut))
	}
	var seen [classes]int
	for _, d := range heldOut {
		seen[d.label]++
	}
	for k, n := range seen {
		if n < 20 {
			t.Errorf("figure %d is held out only %d times", k, n)
		}
	}
}

func TestParseDigitsRefuses(t *testing.T) {
	row := strings.Repeat("0,", pixels)
	for name, in := range map[string]string{
		"empty":       "",
		"few fields":  "1,2,3\n",
		"label":       row + "10\n",
		"pixel":       "17," + strings.Repeat("0,", pixels-1) + "1\n",
		"not numbers": strings.Repeat("x,", pixels) + "1\n",
	} {
		if _, err := parseDigits(strings.NewReader(in)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// The analytic gradient agrees with finite differences.
func TestGradient(t *testing.T) {
	train, _, err := loadDigits()
	if err != nil {
		t.Fatal(err)
	}
	p, g := make([]float32, paramCount), make([]float32, paramCount)
	initParams(p, 3)
	for i := range 20 {
		addGradient(g, p, &train[i])
	}
	loss := func() (s float64) {
		scratch := make([]float32, paramCount)
		for i := range 20 {
			s += addGradient(scratch, p, &train[i])
		}
		return s
	}
	rng := rand.New(rand.NewPCG(1, 1))
	off := 0
	for range 60 {
		i := rng.IntN(paramCount)
		const eps = 2e-3
		was := p[i]
		p[i] = was + eps
		up := loss()
		p[i] = was - eps
		down := loss()
		p[i] = was
		if want := (up - down) / (2 * eps); math.Abs(want-float64(g[i])) > 0.02*math.Max(1, math.Abs(want)) {
			t.Logf("parameter %d: gradient %v, finite difference %v", i, g[i], want)
			off++
		}
	}
	if off > 3 { // a step across the kink of a ReLU spoils the difference, not the gradient
		t.Errorf("%d of 60 gradients are wrong", off)
	}
}

// The training recipe reaches the promised accuracy with no network in between, whatever the seed.
func TestTrainAlone(t *testing.T) {
	if raceEnabled {
		t.Skip("one goroutine has no races")
	}
	train, heldOut, err := loadDigits()
	if err != nil {
		t.Fatal(err)
	}
	for seed := range uint64(2) {
		p, g := make([]float32, paramCount), make([]float32, paramCount)
		opt := &optimizer{rate: defaultRate, momentum: defaultMomentum}
		initParams(p, seed)
		for epoch := range uint64(defaultEpochs) {
			order := permutation(seed, epoch, len(train))
			for b := 0; b < len(order); b += defaultBatch {
				clear(g)
				batch := order[b:min(b+defaultBatch, len(order))]
				for _, i := range batch {
					addGradient(g, p, &train[i])
				}
				opt.apply(p, g, len(batch), (float64(epoch)+float64(b)/float64(len(order)))/defaultEpochs)
			}
			t.Logf("seed %d epoch %2d accuracy %.3f", seed, epoch+1, accuracy(p, heldOut))
		}
		if a := accuracy(p, heldOut); a < 0.94 {
			t.Errorf("seed %d: accuracy %.3f", seed, a)
		}
	}
}
