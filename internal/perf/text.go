package perf

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

var opTitles = map[Op]string{OpSend: "SEND", OpWrite: "RDMA WRITE", OpRead: "RDMA READ", OpAtomic: "atomic", OpRPC: "RPC echo"}

var latencyTitles = map[string]string{
	HalfRoundTrip: "half of a round trip",
	RoundTrip:     "request to response",
	FullOperation: "posted until completed",
}

// title is one line that says what was measured.
func (t *Test) title() string {
	s := opTitles[t.Op]
	if t.Atomic != "" {
		s = map[string]string{"fadd": "FETCH_ADD", "cas": "CMP_SWAP"}[t.Atomic]
	}
	switch t.Kind {
	case Lat:
		return s + " latency"
	case BW:
		return s + " bandwidth"
	}
	return s + " rate"
}

// settings lists the test's settings in words.
func (t *Test) settings() string {
	var s []string
	add := func(format string, args ...any) { s = append(s, fmt.Sprintf(format, args...)) }
	if t.Poll == PollAdaptive {
		add("poll %v (%g us)", t.Poll, t.SpinUS)
	} else {
		add("poll %v", t.Poll)
	}
	if t.Op == OpRPC {
		add("in flight %d", t.InFlight)
	} else {
		add("QPs %d", t.QPs)
		add("depth %d", t.Depth)
		if t.Kind != Lat {
			add("batch %d", t.Batch)
		}
		add("signal every %d", t.SignalEvery)
	}
	if t.Flow != "" {
		add("flow %s", t.Flow)
	}
	if t.DurationS > 0 {
		add("%g s a size", t.DurationS)
	}
	if t.LatencyOf != "" {
		add("clock %s", t.Clock)
	}
	return strings.Join(s, ", ")
}

func (h *Host) line() string {
	s := fmt.Sprintf("%s (%s), %s; %s, %d cores", h.Device, h.Provider, h.Name, h.CPU, h.Cores)
	if h.PollCPU >= 0 {
		s += fmt.Sprintf(", pinned to %d", h.PollCPU)
	}
	return s + fmt.Sprintf("; %s/%s %s, %s, ringside %s", h.OS, h.Arch, h.Kernel, h.Go, h.Version)
}

// WriteHeader writes what is measured, on what: the part of the text form that comes before the results.
func (r *Report) WriteHeader(w io.Writer) error {
	var b strings.Builder
	b.WriteString(r.Test.title())
	if r.Test.LatencyOf != "" {
		fmt.Fprintf(&b, " in microseconds (%s)", latencyTitles[r.Test.LatencyOf])
	}
	fmt.Fprintf(&b, "\n  client  %s\n  server  %s\n  path    %s", r.Client.line(), r.Server.line(), r.Path)
	if r.Spawned {
		b.WriteString(" (server started by this command)")
	}
	fmt.Fprintf(&b, "\n  test    %s\n\n", r.Test.settings())
	_, err := io.WriteString(w, b.String())
	return err
}

// WriteText writes the report as a table for people.
func (r *Report) WriteText(w io.Writer) error {
	if err := r.WriteHeader(w); err != nil {
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	withLatency := r.Test.LatencyOf != ""
	row := func(cells ...string) { fmt.Fprintf(tw, "%s\t\n", strings.Join(cells, "\t")) }

	head := []string{"bytes", "messages"}
	if withLatency {
		head = append(head, "min", "p50", "p90", "p99", "p99.9", "max", "mean")
	}
	row(append(head, "messages/s", "MB/s", "client", "server")...)
	note, inline := false, false
	for i := range r.Results {
		x := &r.Results[i]
		size := fmt.Sprint(x.Size)
		if x.Partial {
			size, note = "*"+size, true
		}
		if x.Inline {
			size, inline = "i"+size, true
		}
		cells := []string{size, fmt.Sprint(x.Messages)}
		if l := x.Latency; l != nil {
			for _, v := range []float64{l.Min, l.P50, l.P90, l.P99, l.P999, l.Max, l.Mean} {
				cells = append(cells, micros(v))
			}
		} else if withLatency {
			cells = append(cells, "-", "-", "-", "-", "-", "-", "-")
		}
		row(append(cells, fmt.Sprintf("%.0f", x.MessagesPerSecond), fmt.Sprintf("%.2f", x.MegabytesPerSecond), cpuText(x.ClientCPU), cpuText(x.ServerCPU))...)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	foot := "client, server: CPU time of the process by message, nanoseconds"
	if inline {
		foot += "; i: sent inline"
	}
	if note {
		foot += "; *: stopped early"
	}
	_, err := fmt.Fprintln(w, foot)
	return err
}

// micros prints nanoseconds as microseconds, with as many digits as the histogram has.
func micros(ns float64) string {
	us := ns / 1000
	switch {
	case us < 100:
		return fmt.Sprintf("%.3f", us)
	case us < 10000:
		return fmt.Sprintf("%.1f", us)
	}
	return fmt.Sprintf("%.0f", us)
}

func cpuText(ns *float64) string {
	if ns == nil {
		return "-"
	}
	return fmt.Sprintf("%.1f", *ns)
}
