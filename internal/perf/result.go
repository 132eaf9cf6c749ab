package perf

import (
	"encoding/json"
	"io"
	"time"

	"github.com/ringside-rdma/ringside/verbs"
)

// Schema names the form of a Report in JSON. Fields may be added to it; a change of what is there changes the number.
const Schema = "ringside.perf/1"

// Report is what a run of Run found, with the conditions under which it did. docs/perf.md documents its JSON form.
type Report struct {
	Schema  string    `json:"schema"`
	Started time.Time `json:"started"`
	Test    Test      `json:"test"`
	Path    string    `json:"path"` // how the two devices reach each other: "shm", "inproc", ...
	// Spawned says that the client started the server itself, on the same host.
	Spawned bool     `json:"spawned"`
	Client  Host     `json:"client"`
	Server  Host     `json:"server"`
	Choice  *Choice  `json:"device_choice,omitempty"` // why the client's device is this one
	Results []Result `json:"results"`
	// Interrupted says that the run was stopped before it was complete: the last result may be partial.
	Interrupted bool `json:"interrupted"`
}

// Choice is verbs.Choice.
type Choice = verbs.Choice

// Test is what was asked for: the settings that are the same for all sizes.
type Test struct {
	Op          Op       `json:"op"`
	Kind        Kind     `json:"kind"`
	LatencyOf   string   `json:"latency_of,omitempty"` // what a latency covers: HalfRoundTrip, RoundTrip or FullOperation
	Poll        PollMode `json:"poll"`
	SpinUS      float64  `json:"spin_us,omitempty"` // adaptive polling: how long before sleeping
	Iters       int64    `json:"iters,omitempty"`   // if asked for
	DurationS   float64  `json:"duration_s,omitempty"`
	Depth       int      `json:"depth,omitempty"`
	Batch       int      `json:"batch,omitempty"`
	QPs         int      `json:"qps,omitempty"`
	SignalEvery int      `json:"signal_every,omitempty"`
	InlineLimit *int     `json:"inline_limit,omitempty"` // -1: chosen by the test; see Result.Inline
	InFlight    int      `json:"in_flight,omitempty"`    // rpc
	Atomic      string   `json:"atomic,omitempty"`
	Flow        string   `json:"flow,omitempty"` // send bw and rate
	Clock       string   `json:"clock"`          // "tsc" or "mono"
}

// testOf describes s; asked is what the caller has set of it, clock the name of the clock that was used.
func testOf(asked, s *Spec, clock string) Test {
	t := Test{Op: s.Op, Kind: s.Kind, Poll: s.Poll, Iters: asked.Iters, DurationS: s.Duration.Seconds(), Clock: clock}
	if s.Poll == PollAdaptive {
		t.SpinUS = float64(s.Spin) / 1e3
	}
	if s.Kind == Lat || s.Op == OpRPC {
		t.LatencyOf = s.LatencyKind()
	}
	if s.Op == OpRPC {
		t.InFlight = s.InFlight
		return t
	}
	t.Depth, t.Batch, t.QPs, t.SignalEvery = s.Depth, s.Batch, s.QPs, s.SignalEvery
	switch s.Op {
	case OpSend, OpWrite:
		t.InlineLimit = &s.Inline
	case OpAtomic:
		t.Atomic = s.Atomic.String()
	}
	if s.Op == OpSend && s.Kind != Lat {
		t.Flow = s.Flow.String()
	}
	return t
}

// Result is the measurement of one message size.
type Result struct {
	Size     int     `json:"size_bytes"`
	Messages uint64  `json:"messages"` // operations of the client (latency tests: round trips), warm-up excluded
	Warmup   uint64  `json:"warmup"`   // operations before those
	Seconds  float64 `json:"seconds"`
	Inline   bool    `json:"inline"`

	Latency *Latency `json:"latency_ns,omitempty"`

	MessagesPerSecond  float64 `json:"messages_per_second"`
	MegabytesPerSecond float64 `json:"megabytes_per_second"` // 10^6 bytes of payload in one direction

	// CPU time that the processes used, all their threads together, by message. Missing where the system does not tell.
	ClientCPU *float64 `json:"client_cpu_ns_per_message,omitempty"`
	ServerCPU *float64 `json:"server_cpu_ns_per_message,omitempty"`

	// Partial says that the measurement was stopped before it was complete.
	Partial bool `json:"partial,omitempty"`
}

// newResult computes the rates; a measurement without messages has none.
func newResult(s *Spec, messages uint64, elapsed time.Duration, client, server *cpuTime) Result {
	r := Result{Size: s.Size, Messages: messages, Seconds: elapsed.Seconds()}
	if messages == 0 {
		return r
	}
	if elapsed > 0 {
		r.MessagesPerSecond = float64(messages) / r.Seconds
		r.MegabytesPerSecond = r.MessagesPerSecond * float64(s.Size) / 1e6
	}
	per := func(c *cpuTime) *float64 {
		if c == nil {
			return nil
		}
		v := float64(c.total()) / float64(messages)
		return &v
	}
	r.ClientCPU, r.ServerCPU = per(client), per(server)
	return r
}

// WriteJSON writes the report as indented JSON.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}
