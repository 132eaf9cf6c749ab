package main

import (
	"runtime"
	"testing"
)

// at is a measurement around which both processors did not change.
func at(first, second, line float64) paces {
	p := pace{[]float64{first, second}, line}
	return paces{p, p}
}

func TestAlike(t *testing.T) {
	usual := at(1, 1, 50)
	for _, c := range []struct {
		name string
		p    paces
		want bool
	}{
		{"the same", usual, true},
		{"a little faster", at(1.2, 1.1, 70), true},
		{"one processor slow", at(0.5, 1, 50), false},
		{"the other one", at(1, 0.5, 50), false},
		{"far from each other", at(1, 1, 220), false},
		{"slow before", paces{{[]float64{0.5, 1}, 50}, usual[1]}, false},
		{"slow after", paces{usual[0], {[]float64{1, 0.5}, 50}}, false},
		{"moved away meanwhile", paces{usual[0], {[]float64{1, 1}, 220}}, false},
	} {
		if got := alike(usual, c.p); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
		if got := alike(c.p, usual); got != c.want {
			t.Errorf("%s, first: %v", c.name, got)
		}
	}
	if one := (paces{{[]float64{1}, 0}, {[]float64{1.1}, 0}}); !alike(one, one) {
		t.Error("one processor is not like itself")
	}
}

// A ratio is of the rounds in which both had the same processors, unless there are too few of them.
func TestRatioOfLike(t *testing.T) {
	slow, fast := at(0.5, 0.5, 50), at(1, 1, 50)
	add := func(r *results, round int, ours, theirs float64, p, q paces) {
		r.add("a", round, values{"p50": ours})
		r.add("b", round, values{"p50": theirs})
		r.around("a", round, p)
		r.around("b", round, q)
	}
	r := newResults()
	add(r, 0, 10, 10, fast, fast)
	add(r, 1, 20, 10, slow, fast)
	add(r, 2, 22, 20, slow, slow)
	add(r, 3, 20, 10, slow, fast)
	add(r, 4, 20, 10, slow, fast)
	num, den := ref{name: "a", metric: "p50"}, ref{name: "b", metric: "p50"}
	if got := r.ratio(num, den); got.ratio != 2 || got.spread() != "1.00..2.00 of all 5" {
		t.Errorf("two rounds are alike: %v, %s", got, got.spread())
	}
	add(r, 5, 11, 10, fast, fast)
	if got := r.ratio(num, den); got.ratio != 1.1 || got.spread() != "1.00..1.10 of 3" {
		t.Errorf("three rounds are alike: %v, %s", got, got.spread())
	}
	r.add("a", 6, values{"p50": 1}) // the other one has failed
	r.around("a", 6, fast)
	if got := r.ratio(num, den); got.ratio != 1.1 || got.spread() != "1.00..1.10 of 3" {
		t.Errorf("with a round of one: %v, %s", got, got.spread())
	}
}

func TestTakePace(t *testing.T) {
	p := takePace()
	if len(p.Speed) == 0 || len(p.Speed) > runtime.NumCPU() {
		t.Fatalf("%d processors of %d", len(p.Speed), runtime.NumCPU())
	}
	for i, s := range p.Speed {
		if s <= 0 {
			t.Errorf("processor %d: %v", i, s)
		}
	}
	if (p.Line > 0) != (len(p.Speed) > 1) {
		t.Errorf("%d processors, and a line takes %v ns", len(p.Speed), p.Line)
	}
}
