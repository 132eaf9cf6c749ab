package main

import (
	"errors"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func recorded(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The outputs are those of perftest 6.06 between rxe devices.
func TestParsePerftest(t *testing.T) {
	for name, want := range map[string]values{
		"ib_send_lat.txt": {"min": 36.00, "p50": 70.07, "mean": 2351.97, "p99": 49166.80, "p999": 110277.19}, // a deviation of -nan
		"ib_read_lat.txt": {"min": 53.14, "p50": 59.88, "mean": 99.35, "p99": 1752.86, "p999": 5341.95},
		"ib_write_bw.txt": {"bw": 50.88 * 1.048576 / 1000},
	} {
		p, err := parsePerftest(recorded(t, name))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(p.values) != len(want) {
			t.Errorf("%s: %v", name, p.values)
		}
		for metric, x := range want {
			if math.Abs(p.values[metric]-x) > 1e-9 {
				t.Errorf("%s: %s is %v, want %v", name, metric, p.values[metric], x)
			}
		}
		if p.settings["Mtu"] != "4096[B]" || p.settings["GID index"] != "1" {
			t.Errorf("%s: %v", name, p.settings)
		}
	}
	p, err := parsePerftest(recorded(t, "ib_send_lat.txt"))
	if err != nil || p.settings["Max inline data"] != "0[B]" || p.settings["TX depth"] != "1" {
		t.Errorf("%v, %v", p, err)
	}
}

func TestParsePerftestRefuses(t *testing.T) {
	good := string(recorded(t, "ib_send_lat.txt"))
	for what, bad := range map[string]string{
		"nothing":         "",
		"no heading":      "Couldn't connect to 127.0.0.1:18515\n",
		"no result":       good[:strings.Index(good, " 8       1000")],
		"a column less":   strings.Replace(good, "36.00", "", 1),
		"no number":       strings.Replace(good, "70.07", "inf?", 1),
		"not a number":    strings.Replace(good, "70.07", "-nan", 1),
		"another heading": strings.Replace(good, "t_typical[usec]", "t_median[usec]", 1),
	} {
		if p, err := parsePerftest([]byte(bad)); err == nil {
			t.Errorf("%s: taken as %v", what, p.values)
		}
	}
}

// Neither of the two programs that write the results file loses what the other has written.
func TestResultsFileSections(t *testing.T) {
	const first = "# Side by side\n\ntable\n"
	section := func(text string) string { return rxePart.begin + "\n\n" + text + "\n\n" + rxePart.end + "\n" }
	if got := rxePart.of(first); got != "" {
		t.Errorf("a section where there is none: %q", got)
	}
	if got := rxePart.in(first, ""); got != first {
		t.Errorf("no section changes the text: %q", got)
	}
	both := rxePart.in(first, section("one"))
	if want := first + "\n" + section("one"); both != want {
		t.Errorf("%q, want %q", both, want)
	}
	if got := rxePart.of(both); got != section("one") {
		t.Errorf("%q", got)
	}
	// make bench-vm again, then make bench again.
	both = rxePart.in(both, section("two"))
	if want := first + "\n" + section("two"); both != want {
		t.Errorf("%q, want %q", both, want)
	}
	both = rxePart.in("# New\n", rxePart.of(both))
	if want := "# New\n\n" + section("two"); both != want {
		t.Errorf("%q, want %q", both, want)
	}
	if got := rxePart.in(both+"\nby hand\n", section("three")); got != "# New\n\n"+section("three")+"\nby hand\n" {
		t.Errorf("%q", got)
	}
}

func TestRXEReport(t *testing.T) {
	send, write, bw := vmCase{"send", "lat", 8}, vmCase{"write", "lat", 4096}, vmCase{"send", "bw", 65536}
	file := &vmFile{Loads: []string{"2.00", "2.10"}}
	for round := range 2 {
		file.Runs = append(file.Runs,
			vmRun{Name: send.ours(), Round: round, Values: values{"p50": 44, "p99": 100}},
			vmRun{Name: send.theirs(), Round: round, Values: values{"p50": float64(40 - round*4), "p99": 90}},
			vmRun{Name: write.ours(), Round: round, Values: values{"p50": 60, "p99": 100}},
			vmRun{Name: bw.ours(), Round: round, Values: values{"bw": 0.1, "packets": 16, "retries": 0, "rnr": 3}},
			vmRun{Name: bw.theirs(), Round: round, Values: values{"bw": 0.1, "packets": 16, "retries": 1, "rnr": 0}})
	}
	file.Runs = append(file.Runs, vmRun{Name: write.theirs(), Round: 1, Err: "did not end"})
	lat, rate, soft := softCase{"send", "lat", 64}, softCase{"send", "rate", 64}, softCase{"write", "bw", 65536}
	for name, v := range map[string]values{
		lat.soft(): {"p50": 50}, lat.rxe(): {"p50": 40}, rate.soft(): {"rate": 30_000}, rate.rxe(): {"rate": 10_000}, soft.soft(): {"bw": 0.1},
		bareName: {"p50": 30},
	} {
		file.Runs = append(file.Runs, vmRun{Name: name, Values: v})
	}
	r := file.results()
	text := rxeReport(&vmPlan{Rounds: 17}, new(conditions), r)
	for _, want := range []string{
		"| 8 B SEND | 44.0 (44.0..44.0) | 38.0 (36.0..40.0) | 1.16 (1.10..1.22 of all 2) | at most 1.10, **short** | 100 (100..100) | 90.0 (90.0..90.0) |",
		"| 4 KiB WRITE | 60.0 (60.0..60.0) | - | - (-) | at most 1.10, not measured |",
		"| 64 KiB SEND | 100 (100..100) | 100 (100..100) | 1.00 (1.00..1.00 of all 2) | at least 0.95, pass | 16.0; 0, 3.00 | 16.0; 1.00, 0 |",
		"| 64 B SEND, p50, us | 50.0 | 40.0 | 1.25 (1.25..1.25 of all 1) | at most 1.00, **short** |",
		"| 64 B SEND, messages/s | 30,000 | 10,000 | 3.00 (3.00..3.00 of all 1) | at least 1.00, pass |",
		"| 64 KiB WRITE, MB/s | 100 | - | - (-) | at least 1.00, not measured |",
		"| as many bytes as a 64 B SEND, over bare UDP sockets, p50, us | 30.0 | 40.0 | 0.75 (0.75..0.75 of all 1) |",
		"- ib_write_lat 4 KiB, round 2: failed: did not end",
		"Only 2 round(s) were measured.",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if rxePart.of(text) != text {
		t.Error("the report is not one section")
	}
	if n := r.failures(); n != 1 {
		t.Errorf("%d failures", n)
	}
}

// What was measured until an error does not take the place of a whole measurement.
func TestPublishVM(t *testing.T) {
	c := &config{results: filepath.Join(t.TempDir(), "RESULTS.md")}
	published := rxePart.begin + "\n\nof 17 rounds\n\n" + rxePart.end + "\n"
	if err := os.WriteFile(c.results, []byte(published), 0o644); err != nil {
		t.Fatal(err)
	}
	plan, got := &vmPlan{Rounds: 17}, &vmFile{Loads: []string{"2.00", "2.10"}}
	for _, runErr := range []error{errors.New("exit status 130"), nil} {
		if err := c.publishVM(plan, new(conditions), got, runErr); err != runErr {
			t.Errorf("%v, want %v", err, runErr)
		}
		text, err := os.ReadFile(c.results)
		if err != nil || (string(text) == published) != (runErr != nil) {
			t.Errorf("after %v: %v, %s", runErr, err, text)
		}
	}
}

// Names of measurements are what sorts results: each is another.
func TestVMMeasurementsHaveNames(t *testing.T) {
	r, seen := &vmRunner{plan: new(vmPlan)}, map[string]bool{}
	var all []measurement
	for _, c := range vmCases {
		all = append(all, c.pair(r)...)
	}
	for _, c := range softCases {
		all = append(all, c.pair(r)...)
	}
	for _, m := range all {
		if seen[m.name] {
			t.Errorf("%s twice", m.name)
		}
		seen[m.name] = true
	}
}

func TestParseGIDs(t *testing.T) {
	const good = `{"devices": [{"ports": [{"gids": [{"index": 0, "gid": "fe80::1"}, {"index": 3, "gid": "::ffff:10.77.0.1", "address": "10.77.0.1"}]}]}]}`
	at, err := parseGIDs([]byte(good))
	if err != nil || len(at) != 1 || at["10.77.0.1"] != 3 {
		t.Errorf("%v, %v", at, err)
	}
	for _, bad := range []string{"", "{}", `{"devices": [{"error": "no"}]}`} {
		if at, err := parseGIDs([]byte(bad)); err == nil {
			t.Errorf("%q was taken: %v", bad, at)
		}
	}
	r := &vmRunner{softGIDs: at}
	if _, _, err := r.softEnds(); err == nil {
		t.Error("an address that soft0 does not have was taken")
	}
	r.softGIDs[serverAddr] = 4
	client, server, err := r.softEnds()
	if got := strings.Join(append(client, server...), " "); err != nil || got != "--device soft0 --gid-index 3 --path udp --device soft0 --gid-index 4" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestPair(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port // what a pair waits for: who listens does not matter
	sh := func(script string) *exec.Cmd { return exec.Command("sh", "-c", script) }
	for _, c := range []struct{ what, server, client, out, err string }{
		{"good", "true", "echo result", "result\n", ""},
		{"pinned", "true", "echo result", "result\n", ""},
		{"client fails", "exec sleep 60", "echo result; echo why >&2; exit 3", "", "exit status 3: why result"},
		{"server fails", "echo bad; exit 4", "sleep 0.1", "", "exit status 4: bad"},
		{"client hangs", "exec sleep 60", "exec sleep 60", "", "did not end within"},
		{"server hangs", "exec sleep 60", "true", "", "did not end after its client had"},
	} {
		r := vmRunner{port: port}
		out, err := r.pairWithin(sh(c.server), sh(c.client), c.what == "pinned", 2*time.Second)
		if string(out) != c.out || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %q, %v", c.what, out, err)
		}
		if r.port != port+1 {
			t.Errorf("%s: the next run has port %d", c.what, r.port)
		}
	}
	r := vmRunner{port: 1}
	if _, err := r.pairWithin(sh("exec sleep 60"), sh("true"), false, 200*time.Millisecond); err == nil || !strings.Contains(err.Error(), "does not listen") {
		t.Error(err)
	}
	if _, err := r.pair(exec.Command("/nonexistent"), sh("true"), false); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
