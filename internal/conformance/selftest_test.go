package conformance

import (
	"context"
	"errors"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs"
)

// flaky is the software NIC, which can be opened flakyOpens times in a process.
const flaky = "flaky"

var flakyOpens atomic.Int32

func init() {
	brought[flaky] = func() (*verbs.Context, error) {
		if flakyOpens.Add(-1) < 0 {
			return nil, errors.New("it is flaky")
		}
		return verbs.Open("soft0")
	}
}

// runOn is Run on the cases that match only, and what it reported.
func runOn(t *testing.T, device, only string) (all []Result, err error) {
	t.Helper()
	defer func(o Options) { options = o }(options)
	err = Run(t.Context(), Options{Device: device, Only: regexp.MustCompile(only)}, func(r Result) { all = append(all, r) })
	return all, err
}

// A case that fails before its own part begins is a failure like others: it is reported, with why, and the next one is run. What the sides
// had opened by then is closed.
func TestRunReportsEveryFailure(t *testing.T) {
	testutil.CheckLeaks(t)
	const only = "^(rc/send|rc/send-imm|placement/absent)$" // the last is in no row of the matrix
	names := func(o Outcome, all []Result) (got []string) {
		for _, r := range all {
			if r.Outcome == o {
				got = append(got, r.Case)
			}
		}
		return got
	}
	var cases []string
	for _, tc := range table {
		if regexp.MustCompile(only).MatchString(tc.name) {
			cases = append(cases, tc.name)
		}
	}
	if len(cases) != 3 {
		t.Fatalf("cases %q", cases)
	}
	// The warm-up opens two contexts. No more to three more are left for the cases, which open two each.
	for opens, passed := range map[int]int{2: 0, 3: 0, 4: 1, 5: 1} {
		flakyOpens.Store(int32(opens))
		all, err := runOn(t, flaky, only)
		if got := names(Passed, all); !slices.Equal(got, cases[:passed]) {
			t.Errorf("%d opens: passed %q", opens, got)
		}
		if got := names(Failed, all); !slices.Equal(got, cases[passed:]) {
			t.Errorf("%d opens: failed %q", opens, got)
		}
		for _, r := range all {
			if r.Outcome == Failed && (!strings.Contains(r.Log, "open: it is flaky") || r.Column != "soft, in-process" || r.Path != "in-process") {
				t.Errorf("%d opens: %+v", opens, r)
			}
		}
		// Then nothing can be opened for the warm-up of the next path.
		if runtime.GOOS != "linux" {
			continue
		}
		if !errors.Is(err, errNotConnected) || !strings.Contains(err.Error(), "processes: ") || !strings.Contains(err.Error(), "it is flaky") {
			t.Errorf("%d opens: error %v", opens, err)
		}
	}
}

// Run says that it was told to stop, which is no failure of a case.
func TestRunInterrupted(t *testing.T) {
	defer func(o Options) { options = o }(options)
	ctx, cancel := context.WithCancel(t.Context())
	var all []Result
	err := Run(ctx, Options{Device: "soft0", Only: regexp.MustCompile("^rc/")}, func(r Result) {
		all = append(all, r)
		cancel()
	})
	if !errors.Is(err, context.Canceled) || len(all) != 1 || all[0].Outcome != Passed {
		t.Errorf("error %v, %+v", err, all)
	}
}

// A script does as package testing does: Fatal and Skip end it, a panic fails it, and what was left to be done is, last first, whatever
// becomes of it.
func TestScript(t *testing.T) {
	for _, tc := range []struct {
		name            string
		run             func(T)
		failed, skipped bool
		log             []string // parts of it, in this order
	}{
		{name: "passes", run: func(s T) { s.Log("a", 1); s.Logf("b%d\n", 2) }, log: []string{"a 1\n", "b2\n"}},
		{name: "goes on behind an error", run: func(s T) { s.Error("a"); s.Errorf("b%d", 2) }, failed: true, log: []string{"a\n", "b2\n"}},
		{name: "ends at once", run: func(s T) { s.Fatal("a"); s.Log("not this") }, failed: true, log: []string{"a\n"}},
		{name: "ends at once, formatted", run: func(s T) { s.Fatalf("a%d", 1); s.Log("not this") }, failed: true, log: []string{"a1\n"}},
		{name: "is skipped", run: func(s T) { s.Skip("why"); s.Log("not this") }, skipped: true, log: []string{"why\n"}},
		{name: "fails, then skips", run: func(s T) { s.Error("a"); s.Skip("why") }, failed: true, log: []string{"a\n", "why\n"}},
		{name: "panics", run: func(T) { panic("oh") }, failed: true, log: []string{"panic: oh\n"}},
		{name: "cleans up", run: func(s T) {
			s.Cleanup(func() { s.Log("third") })
			s.Cleanup(func() { s.Fatal("second") })
			s.Cleanup(func() { s.Cleanup(func() { s.Log("first, of a cleanup") }) })
			s.Fatal("body")
		}, failed: true, log: []string{"body\n", "first, of a cleanup\n", "second\n", "third\n"}},
		{name: "panics while it cleans up", run: func(s T) {
			s.Cleanup(func() { s.Log("still") })
			s.Cleanup(func() { panic("oh") })
		}, failed: true, log: []string{"panic: oh\n", "still\n"}},
	} {
		s := newScript(tc.name)
		s.play(tc.run)
		log, rest := s.Logged(), s.Logged()
		for _, part := range tc.log {
			_, after, ok := strings.Cut(rest, part)
			if !ok {
				t.Errorf("%s: %q is missing, or out of order, in %q", tc.name, part, log)
			}
			rest = after
		}
		if s.Name() != tc.name || s.Failed() != tc.failed || s.Skipped() != tc.skipped || strings.Contains(log, "not this") {
			t.Errorf("%s: failed %v, skipped %v, log %q", tc.name, s.Failed(), s.Skipped(), log)
		}
	}
}
