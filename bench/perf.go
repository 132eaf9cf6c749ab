package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strconv"
	"time"
)

// perfTest is one run of `ringside perf` between two processes.
type perfTest struct {
	op, kind string
	size     int
	iter     int
	args     []string
}

func (p perfTest) run(c *config) (values, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	args := []string{"perf", p.op, p.kind, "--spawn", "-o", "json", "--iters", strconv.Itoa(p.iter)}
	if p.op != "atomic" {
		args = append(args, "--size", strconv.Itoa(p.size))
	}
	cmd := exec.CommandContext(ctx, c.ringside, append(args, p.args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%v: %w: %s", cmd.Args, err, bytes.TrimSpace(errs.Bytes()))
	}
	return parsePerf(out.Bytes(), "shm")
}

// perfResult is the part of ringside perf's JSON that is used.
type perfResult struct {
	Messages uint64 `json:"messages"`
	Warmup   uint64 `json:"warmup"` // messages before those
	Latency  *struct {
		Min  float64 `json:"min"`
		Mean float64 `json:"mean"`
		P50  float64 `json:"p50"`
		P99  float64 `json:"p99"`
		P999 float64 `json:"p99_9"`
	} `json:"latency_ns"`
	Rate float64 `json:"messages_per_second"`
	BW   float64 `json:"megabytes_per_second"`
}

// parsePerf reads what is compared of ringside perf's JSON; path is how the devices should have reached each other.
func parsePerf(out []byte, path string) (values, error) {
	r, err := readPerf(out, path)
	if err != nil {
		return nil, err
	}
	return r.values(), nil
}

func readPerf(out []byte, path string) (*perfResult, error) {
	var report struct {
		Path    string       `json:"path"`
		Results []perfResult `json:"results"`
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return nil, fmt.Errorf("ringside perf's output: %w: %q", err, out)
	}
	if len(report.Results) != 1 || report.Path != path {
		return nil, fmt.Errorf("ringside perf gave %d results over path %q, not one over %s", len(report.Results), report.Path, path)
	}
	return &report.Results[0], nil
}

func (r *perfResult) values() values {
	v := values{"rate": r.Rate, "bw": r.BW / 1000}
	if l := r.Latency; l != nil {
		v["min"], v["mean"], v["p50"], v["p99"], v["p999"] = l.Min/1000, l.Mean/1000, l.P50/1000, l.P99/1000, l.P999/1000
	}
	return v
}
