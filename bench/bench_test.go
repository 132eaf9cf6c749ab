package main

import (
	"errors"
	"math"
	"strings"
	"testing"
)

func TestParseUCX(t *testing.T) {
	const out = "[1234.5] some warning\niterations,50.0_percentile_lat,avg_lat,overall_lat,avg_bw,overall_bw,avg_mr,overall_mr\n" +
		"1000000,0.132,0.135,0.136,56.58,57.58,7416557,7416558\n"
	v, err := parseUCX([]byte(out))
	if err != nil {
		t.Fatal(err)
	}
	if v["p50"] != 0.132 || v["mean"] != 0.136 || v["rate"] != 7416558 || math.Abs(v["bw"]-0.0604) > 1e-4 {
		t.Errorf("%v", v)
	}
	for _, bad := range []string{"", "iterations,", "iterations,a\nx,y\n", "iterations,overall_lat\n1,2\n", "iterations,overall_lat\n1,2,3\n"} {
		if v, err := parseUCX([]byte(bad)); err == nil {
			t.Errorf("%q gave %v", bad, v)
		}
	}
}

func TestParsePerf(t *testing.T) {
	const out = `{"path": "shm", "results": [{"latency_ns": {"p50": 210, "p99": 300, "p99_9": 1000}, "messages_per_second": 2e6, "megabytes_per_second": 128}]}`
	v, err := parsePerf([]byte(out), "shm")
	if err != nil {
		t.Fatal(err)
	}
	if v["p50"] != 0.21 || v["p999"] != 1 || v["rate"] != 2e6 || v["bw"] != 0.128 {
		t.Errorf("%v", v)
	}
	for _, bad := range []string{"", "{}", `{"path":"inproc","results":[{}]}`} {
		if _, err := parsePerf([]byte(bad), "shm"); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestSeries(t *testing.T) {
	if got := (series{3, 1, 2}).String(); got != "2.00 (1.00..3.00)" {
		t.Error(got)
	}
	if got := (series{1, 2}).median(); got != 1.5 {
		t.Error(got)
	}
	for x, want := range map[float64]string{0: "0", 0.001: "0.0010", 1.234: "1.23", 56.78: "56.8", 1234567: "1,234,567", -1000: "-1,000", 999.7: "1,000"} {
		if got := number(x); got != want {
			t.Errorf("number(%v) = %s, want %s", x, got, want)
		}
	}
}

func TestTargets(t *testing.T) {
	r := newResults()
	r.add(perfName("send", "lat", 64), 0, values{"p50": 0.2})
	r.add(perfName("send", "lat", 64), 1, values{"p50": 0.3})
	r.add(ucxName("tag_lat", 64), 0, values{"p50": 0.2})
	r.add(ucxName("tag_lat", 64), 1, values{"p50": 0.2})
	r.add("rpc light", 0, values{"cpu_percent": 12})
	table := targetTable(r)
	for _, want := range []string{
		"| at most 1.20 | 1.25 | 1.00..1.50 of all 2 | **short** |",
		"| at most 10.0 | 12.0 | 12.0..12.0 | **short** |",
		"| - | - | not measured |",
	} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in\n%s", want, table)
		}
	}
	r.fail("x", errSkipped)
	r.fail("y", errors.New("broken"))
	if n := r.failures(); n != 1 {
		t.Errorf("%d failures", n)
	}
}

// Every measurement that a target or the report names is made.
func TestTargetsAreMeasured(t *testing.T) {
	made := map[string]bool{}
	for _, m := range measurements(&config{}) {
		if made[m.name] {
			t.Errorf("%s twice", m.name)
		}
		made[m.name] = true
	}
	for _, target := range targets {
		for _, ref := range []ref{target.num, target.den} {
			if ref.name != "" && !made[ref.name] {
				t.Errorf("%s: nothing measures %s", target.what, ref.name)
			}
		}
	}
}
