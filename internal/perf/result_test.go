package perf

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"flag"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/verbs"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden compares got with testdata/name.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (go test -update rewrites it):\n%s", path, got)
	}
}

func sampleHost(cpu int) Host {
	return Host{Name: "node1", OS: "linux", Arch: "amd64", Kernel: "6.12.0", CPU: "Example CPU <3 GHz>", Cores: 2, GOMAXPROCS: 2, PollCPU: cpu,
		Go: "go1.26.0", Version: "v0.1.0", Device: "soft0", Provider: "soft", Tier: "software NIC"}
}

func sampleReport(op Op, kind Kind, sizes ...int) *Report {
	s := Spec{Op: op, Kind: kind, Inline: InlineAuto}.WithDefaults()
	r := &Report{Schema: Schema, Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Test: testOf(&Spec{Iters: 100_000}, &s, "tsc"), Path: "shm",
		Client: sampleHost(-1), Server: sampleHost(1), Results: []Result{}}
	for i, n := range sizes {
		s.Size = n
		x := newResult(&s, 100_000, 250*time.Millisecond+time.Duration(n)*time.Microsecond,
			&cpuTime{user: 200 * time.Millisecond, system: 50 * time.Millisecond}, &cpuTime{user: 125 * time.Millisecond})
		x.Inline, x.Warmup = s.inlineWish() > 0, 1000
		if r.Test.LatencyOf != "" {
			base := 200 + float64(n)/10
			x.Latency = &Latency{Min: base * 0.9, Mean: base * 1.1, StdDev: 3, P50: base, P90: base * 1.3, P99: base * 2, P999: base * 9.5, Max: base * 400}
			for j, p := range []float64{0, 50, 90, 99, 99.9, 99.99} {
				x.Latency.curve = append(x.Latency.curve, curvePoint{p, base * math.Pow(2, float64(j))})
			}
		}
		x.Partial = i == 3
		r.Results = append(r.Results, x)
	}
	r.Interrupted = len(sizes) > 3
	return r
}

func TestReportGolden(t *testing.T) {
	for _, tt := range []struct {
		name string
		r    *Report
	}{
		{"send_lat", sampleReport(OpSend, Lat, 2, 64, 4096, 1<<20)},
		{"write_lat_one", sampleReport(OpWrite, Lat, 8)},
		{"atomic_lat", sampleReport(OpAtomic, Lat, 8)},
		{"send_bw", sampleReport(OpSend, BW, 64, 65536, 8<<20)},
		{"write_rate", sampleReport(OpWrite, Rate, 64)},
		{"rpc_rate", sampleReport(OpRPC, Rate, 64, 1024)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var text, js, svg bytes.Buffer
			if err := tt.r.WriteText(&text); err != nil {
				t.Fatal(err)
			}
			golden(t, tt.name+".txt", text.Bytes())
			if err := tt.r.WriteJSON(&js); err != nil {
				t.Fatal(err)
			}
			golden(t, tt.name+".json", js.Bytes())
			if err := tt.r.WritePlot(&svg); err != nil {
				t.Fatal(err)
			}
			golden(t, tt.name+".svg", svg.Bytes())
			wellFormed(t, svg.Bytes())
		})
	}
}

func wellFormed(t *testing.T, b []byte) {
	t.Helper()
	d := xml.NewDecoder(bytes.NewReader(b))
	for {
		if _, err := d.Token(); err == io.EOF {
			return
		} else if err != nil {
			t.Fatalf("not well-formed: %v", err)
		}
	}
}

// TestSchema pins the names of the JSON form: programs read them.
func TestSchema(t *testing.T) {
	r := sampleReport(OpSend, Lat, 64)
	r.Choice = &Choice{Device: verbs.DeviceInfo{Name: "soft0"}, Reason: "r", Passed: []verbs.Passed{{Reason: "r"}}}
	r.Results[0].Partial = true
	r.Test.SpinUS, r.Test.DurationS, r.Test.InFlight, r.Test.Atomic, r.Test.Flow = 1, 1, 1, "fadd", "credit"
	var b bytes.Buffer
	if err := r.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal(b.Bytes(), &v); err != nil {
		t.Fatal(err)
	}
	var names []string
	var walk func(prefix string, v any)
	walk = func(prefix string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, e := range v {
				walk(prefix+"."+k, e)
			}
		case []any:
			for _, e := range v {
				walk(prefix+"[]", e)
			}
		default:
			names = append(names, prefix[1:])
		}
	}
	walk("", v)
	slices.Sort(names)
	golden(t, "schema.txt", []byte(strings.Join(slices.Compact(names), "\n")+"\n"))
}

func TestPlotOfNothing(t *testing.T) {
	r := sampleReport(OpSend, Lat)
	if err := r.WritePlot(io.Discard); err == nil {
		t.Error("a report without results was plotted")
	}
}

// TestPlotOddValues draws what real runs produce now and then: equal values, one point, zeros.
func TestPlotOddValues(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(r *Report)
		kind Kind
	}{
		{"flat", func(r *Report) {
			for i := range r.Results {
				r.Results[i].MegabytesPerSecond = 10
			}
		}, BW},
		{"zero", func(r *Report) { r.Results[0].MegabytesPerSecond = 0 }, BW},
		{"one point", func(r *Report) { r.Results = r.Results[:1] }, BW},
		{"no curve", func(r *Report) { r.Results = r.Results[:1]; r.Results[0].Latency.curve = nil }, Lat},
		{"many sizes", func(r *Report) {
			*r = *sampleReport(OpWrite, Lat, PowersOfTwo(8<<20)...)
		}, Lat},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := sampleReport(OpSend, tt.kind, 64, 128)
			tt.edit(r)
			var b bytes.Buffer
			if err := r.WritePlot(&b); err != nil {
				t.Fatal(err)
			}
			wellFormed(t, b.Bytes())
			for _, bad := range []string{"NaN", "Inf"} {
				if strings.Contains(b.String(), bad) {
					t.Errorf("%s in the picture:\n%s", bad, b.String())
				}
			}
		})
	}
}

func TestTicks(t *testing.T) {
	for _, tt := range []struct {
		got, want []float64
	}{
		{niceTicks(150, 900), []float64{100, 200, 500, 1000}},
		{niceTicks(100, 1000), []float64{100, 200, 500, 1000}},
		{niceTicks(300, 300), []float64{200, 500}},
		{niceTicks(1, 1e6), []float64{1, 10, 100, 1e3, 1e4, 1e5, 1e6}},
		{powerTicks(64, 64), []float64{32, 64, 128}},
		{powerTicks(3, 9), []float64{2, 4, 8, 16}},
	} {
		if !slices.EqualFunc(tt.got, tt.want, func(a, b float64) bool { return math.Abs(a-b) < 1e-6*b }) {
			t.Errorf("got %v, want %v", tt.got, tt.want)
		}
	}
	for v, want := range map[float64]string{1: "0 %", 2: "50 %", 10: "90 %", 100: "99 %", 1000: "99.9 %", 1e4: "99.99 %"} {
		if got := percentileText(v); got != want {
			t.Errorf("percentile 1-1/%v is written %q, want %q", v, got, want)
		}
	}
}

func TestRecorder(t *testing.T) {
	r := newRecorder(1000, 0.4, 2) // a tick is 0.4 ns; halves are reported
	at := uint64(1 << 60)
	r.stamps[0] = at
	for i := range 1000 {
		at += uint64(1000 + i) // 200 ns to 399.8 ns
		r.stamps[i+1] = at
	}
	r.fold(1000)
	l := r.latency()
	near := func(name string, got, want, tolerance float64) {
		t.Helper()
		if math.Abs(got-want) > tolerance*want {
			t.Errorf("%s = %v, want %v", name, got, want)
		}
	}
	near("min", l.Min, 200, 1e-9)
	near("max", l.Max, 399.8, 1e-9)
	near("mean", l.Mean, 299.9, 1e-9)
	near("p50", l.P50, 300, 2e-3)
	near("p90", l.P90, 380, 2e-3)
	near("p99.9", l.P999, 399.8, 2e-3)
	near("stddev", l.StdDev, 0.2*1000/math.Sqrt(12), 1e-2)
	if l.P999 > l.Max {
		t.Errorf("p99.9 %v is above the maximum %v", l.P999, l.Max)
	}

	// A second chunk, with a reading that went backwards: counted as 0, and nothing wraps.
	r.stamps[0], r.stamps[1], r.stamps[2] = 100, 90, 3_000_000_100
	r.fold(2)
	l = r.latency()
	if r.n != 1002 || l.Min != 0 {
		t.Errorf("n = %d, min = %v", r.n, l.Min)
	}
	near("max after a stall", l.Max, 0.2*3e9, 1e-6)
	if newRecorder(1, 1, 1).latency() != nil {
		t.Error("no samples have a distribution")
	}
}

func TestMicros(t *testing.T) {
	for ns, want := range map[float64]string{83.2: "0.083", 1234.5: "1.234", 1e5: "100.0", 1e9: "1000000"} {
		if got := micros(ns); got != want {
			t.Errorf("micros(%v) = %q, want %q", ns, got, want)
		}
	}
}
