package main

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
)

// values are the results of one measurement in one round, by metric: "p50", "rate", ...; the unit is in metricUnit.
type values map[string]float64

func (v values) String() string {
	var names []string
	for name := range v {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return metricRank(a) - metricRank(b) })
	var b strings.Builder
	for i, name := range names {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(name + " " + number(v[name]))
	}
	return b.String()
}

var metricOrder = []string{"p50", "p90", "p99", "p999", "max", "rate", "bw", "client_allocs", "server_allocs", "cpu", "cpu_percent",
	"min", "mean", "packets", "retries", "rnr", "flush_p50", "flush_max", "done_p50", "done_max"}

func metricRank(name string) int {
	if i := slices.Index(metricOrder, name); i >= 0 {
		return i
	}
	return len(metricOrder)
}

// errSkipped marks measurements that this machine cannot make; they are reported and are no failure.
var errSkipped = errors.New("skipped")

type results struct {
	rounds map[string]map[int]values
	paces  map[string]map[int]paces
	errs   map[string]error
	loads  []string // load average after each round
}

func newResults() *results {
	return &results{rounds: map[string]map[int]values{}, paces: map[string]map[int]paces{}, errs: map[string]error{}}
}

func (r *results) add(name string, round int, v values) {
	if r.rounds[name] == nil {
		r.rounds[name] = map[int]values{}
	}
	r.rounds[name][round] = v
}

// around notes how fast the processors were then.
func (r *results) around(name string, round int, p paces) {
	if r.paces[name] == nil {
		r.paces[name] = map[int]paces{}
	}
	r.paces[name][round] = p
}

func (r *results) fail(name string, err error) { r.errs[name] = err }

func (r *results) endRound(load string) { r.loads = append(r.loads, load) }

// failures counts measurements that failed in some round for another reason than errSkipped.
func (r *results) failures() (n int) {
	for _, err := range r.errs {
		if !errors.Is(err, errSkipped) {
			n++
		}
	}
	return n
}

// err is an error if there were failures.
func (r *results) err() error {
	if n := r.failures(); n > 0 {
		return fmt.Errorf("%d measurements failed", n)
	}
	return nil
}

// series returns the values of one metric over the rounds, scaled; rounds without it are left out.
func (r *results) series(name, metric string, scale float64) series {
	return r.of(name, metric, scale, nil)
}

// of is series without the rounds that are left out.
func (r *results) of(name, metric string, scale float64, out map[int]bool) (s series) {
	for round, v := range r.rounds[name] {
		if x, ok := v[metric]; ok && !out[round] {
			s = append(s, x*scale)
		}
	}
	return s
}

// enough is how many rounds a ratio needs at least that are like each other.
const enough = 3

// unlike are the rounds in which two measurements were not made at the same pace; nil if too few would be left.
func (r *results) unlike(a, b string) map[int]bool {
	out, left := map[int]bool{}, 0
	for round, p := range r.paces[a] {
		if q, ok := r.paces[b][round]; ok && alike(p, q) {
			left++
		} else {
			out[round] = true
		}
	}
	for round := range r.paces[b] {
		if _, ok := r.paces[a][round]; !ok {
			out[round] = true
		}
	}
	if left < enough {
		return nil
	}
	return out
}

// A comparison is the quotient of two metrics: of their medians, and of each round.
type comparison struct {
	ratio  float64
	rounds series
	alike  bool // these are the rounds in which both were measured at the same pace: of all, if too few were
}

// spread prints that of the rounds, and how many these are.
func (c comparison) spread() string {
	switch {
	case len(c.rounds) == 0:
		return "-"
	case c.alike:
		return fmt.Sprintf("%s of %d", c.rounds.between(), len(c.rounds))
	}
	return fmt.Sprintf("%s of all %d", c.rounds.between(), len(c.rounds))
}

func (r *results) ratio(num, den ref) comparison {
	out := r.unlike(num.name, den.name)
	c := comparison{ratio: math.NaN(), alike: out != nil}
	for round, v := range r.rounds[num.name] {
		if out[round] {
			continue
		}
		a, ok1 := v[num.metric]
		b, ok2 := r.rounds[den.name][round][den.metric]
		if ok1 && ok2 && b != 0 {
			c.rounds = append(c.rounds, a*num.factor()/(b*den.factor()))
		}
	}
	a, b := r.of(num.name, num.metric, num.factor(), out), r.of(den.name, den.metric, den.factor(), out)
	if len(a) == 0 || len(b) == 0 || b.median() == 0 {
		return comparison{ratio: math.NaN()}
	}
	c.ratio = a.median() / b.median()
	return c
}

// beside is the cells of a row that compares a metric of two measurements: either's, their ratio, and whether that is the target, if
// there is one.
func (r *results) beside(ours, theirs, metric string, scale float64, t *target) string {
	c := r.ratio(ref{name: ours, metric: metric}, ref{name: theirs, metric: metric})
	bound := ""
	if t != nil {
		bound = t.bound() + ", " + t.verdict(c.ratio)
	}
	return fmt.Sprintf("%s | %s | %s (%s) | %s", r.series(ours, metric, scale), r.series(theirs, metric, scale), number(c.ratio), c.spread(), bound)
}

// ref names a metric of a measurement, times a factor (0 means 1).
type ref struct {
	name, metric string
	times        float64
}

func (r ref) factor() float64 {
	if r.times == 0 {
		return 1
	}
	return r.times
}

type series []float64

func (s series) median() float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	s = slices.Sorted(slices.Values(s))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// String prints the median and the spread: "0.31 (0.29..0.45)".
func (s series) String() string {
	switch len(s) {
	case 0:
		return "-"
	case 1:
		return number(s[0])
	}
	return fmt.Sprintf("%s (%s)", number(s.median()), s.between())
}

// between prints the spread.
func (s series) between() string {
	if len(s) == 0 {
		return "-"
	}
	return number(slices.Min(s)) + ".." + number(slices.Max(s))
}

// number prints three significant digits, and large numbers in full.
func number(x float64) string {
	switch a := math.Abs(x); {
	case math.IsNaN(x):
		return "-"
	case a == 0:
		return "0"
	case a < 0.005:
		return fmt.Sprintf("%.4f", x)
	case a < 10:
		return fmt.Sprintf("%.2f", x)
	case a < 100:
		return fmt.Sprintf("%.1f", x)
	default:
		return thousands(int64(math.Round(x)))
	}
}

func thousands(n int64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
