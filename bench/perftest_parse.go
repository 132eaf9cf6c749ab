package main

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// perftestOutput is what a client of perftest prints.
type perftestOutput struct {
	settings map[string]string // the first of each line, such as "Mtu": "4096[B]"
	values   values            // latencies in us, "bw" in GB/s
}

// perftestColumns are the columns that are compared, the metric that each is, and what makes it the metric's unit. "MB/sec"
// are 2^20 bytes a second; t_typical is the median.
var perftestColumns = map[string]struct {
	metric string
	scale  float64
}{
	"t_min[usec]":            {"min", 1},
	"t_typical[usec]":        {"p50", 1},
	"t_avg[usec]":            {"mean", 1},
	"99%_percentile[usec]":   {"p99", 1},
	"99.9%_percentile[usec]": {"p999", 1},
	"BW_average[MB/sec]":     {"bw", (1 << 20) / 1e9},
}

var (
	perftestSetting = regexp.MustCompile(`(?m)^ (\S[^:\n]*?)\s*: (\S+)`)
	// Two words of one heading, where columns are set apart by spaces, too.
	perftestHeading = strings.NewReplacer("% percentile", "%_percentile", "BW ", "BW_")
)

// parsePerftest reads the output of a client of perftest 6 for one message size: a heading that begins with #bytes, and
// a line of numbers under it.
func parsePerftest(out []byte) (*perftestOutput, error) {
	p := &perftestOutput{settings: map[string]string{}, values: values{}}
	for _, m := range perftestSetting.FindAllStringSubmatch(string(out), -1) {
		p.settings[m[1]] = m[2]
	}
	_, table, ok := strings.Cut(string(out), "\n #bytes")
	if !ok {
		return nil, fmt.Errorf("perftest printed no heading: %q", out)
	}
	heading, rest, _ := strings.Cut("#bytes"+table, "\n")
	row, _, _ := strings.Cut(rest, "\n")
	names, cells := strings.Fields(perftestHeading.Replace(heading)), strings.Fields(row)
	if len(names) != len(cells) {
		return nil, fmt.Errorf("perftest's heading has %d columns, and its result %d: %q, %q", len(names), len(cells), heading, row)
	}
	for i, name := range names {
		col, ok := perftestColumns[name]
		if !ok {
			continue
		}
		x, err := strconv.ParseFloat(cells[i], 64)
		if err != nil || !(x >= 0) {
			return nil, fmt.Errorf("perftest's output: column %s is %q", name, cells[i])
		}
		p.values[col.metric] = x * col.scale
	}
	if p.values["p50"] == 0 && p.values["bw"] == 0 {
		return nil, fmt.Errorf("perftest's columns have changed: %q", heading)
	}
	return p, nil
}
