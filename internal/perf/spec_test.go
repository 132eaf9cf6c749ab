package perf

import (
	"strings"
	"testing"
	"time"
)

func TestSpecDefaultsAreValid(t *testing.T) {
	for _, op := range Ops() {
		for _, k := range Kinds() {
			s := Spec{Op: op, Kind: k, Inline: InlineAuto}.WithDefaults()
			if err := s.Validate(); err != nil {
				t.Errorf("%v %v: %v", op, k, err)
			}
			if s2 := s.WithDefaults(); s2 != s {
				t.Errorf("%v %v: defaults change twice: %+v, %+v", op, k, s, s2)
			}
		}
	}
}

// TestSpecLargeMessages: a sweep must not take for ever at its large end.
func TestSpecLargeMessages(t *testing.T) {
	for _, k := range Kinds() {
		small, large := Spec{Op: OpWrite, Kind: k, Size: 64}.WithDefaults(), Spec{Op: OpWrite, Kind: k, Size: 8 << 20}.WithDefaults()
		if large.Iters < 100 || large.Iters*int64(large.Size) > 4<<30 && large.Iters > 100 || large.Warmup > 100 || small.Iters < 5000 || small.Warmup < 1000 {
			t.Errorf("%v: %d and %d iterations, %d and %d before", k, small.Iters, large.Iters, small.Warmup, large.Warmup)
		}
		if s := (Spec{Op: OpWrite, Kind: k, Iters: 5}).WithDefaults(); s.Warmup != 5 || s.Iters != 5 {
			t.Errorf("%v: %d iterations after %d", k, s.Iters, s.Warmup)
		}
		if s := (Spec{Op: OpWrite, Kind: k, Iters: 5, Warmup: 9}).WithDefaults(); s.Warmup != 9 {
			t.Errorf("%v: warm-up of 9 became %d", k, s.Warmup)
		}
	}
}

func TestSpecValidate(t *testing.T) {
	for _, tt := range []struct {
		name string
		spec Spec
		want string
	}{
		{"no op", Spec{Kind: Lat}, "unknown operation"},
		{"no kind", Spec{Op: OpSend}, "unknown kind"},
		{"poll mode", Spec{Op: OpSend, Kind: Lat, Poll: 9}, "unknown poll mode"},
		{"size", Spec{Op: OpSend, Kind: BW, Size: MaxSize + 1}, "size is 1073741825: want 1 to"},
		{"iters and duration", Spec{Op: OpSend, Kind: BW, Iters: 5, Duration: time.Second}, "choose one"},
		{"size of an atomic", Spec{Op: OpAtomic, Kind: Lat, Size: 16}, "atomics work on 8 bytes"},
		{"write lat by events", Spec{Op: OpWrite, Kind: Lat, Poll: PollEvent}, "measure send lat"},
		{"lat with QPs", Spec{Op: OpSend, Kind: Lat, QPs: 4}, "uses 1 QP"},
		{"lat with batches", Spec{Op: OpSend, Kind: Lat, Batch: 4}, "1 work request at a time"},
		{"lat in flight", Spec{Op: OpRPC, Kind: Lat, InFlight: 4}, "1 call in flight"},
		{"signal too rarely", Spec{Op: OpSend, Kind: BW, Depth: 16, SignalEvery: 9}, "more than half of depth"},
		{"too much work", Spec{Op: OpSend, Kind: BW, Depth: MaxDepth, QPs: MaxQPs}, "work requests"},
		{"too much memory", Spec{Op: OpWrite, Kind: BW, Size: MaxSize, QPs: 4}, "registered memory"},
		{"inline read", Spec{Op: OpRead, Kind: Lat, Inline: 8}, "cannot be inline"},
		{"inline", Spec{Op: OpWrite, Kind: Lat, Inline: -2}, "inline is -2"},
		{"spin", Spec{Op: OpRPC, Kind: Lat, Spin: -5}, "spin is -5: want 1 to"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := tt.spec.WithDefaults()
			err := s.Validate()
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v does not say %q", err, tt.want)
			}
		})
	}
}

func TestSpecGeometry(t *testing.T) {
	for _, tt := range []struct{ size, slot, slots int }{
		{1, 64, 64}, {64, 64, 64}, {65, 128, 32}, {192, 192, 16}, {4096, 4096, 1}, {65536, 65536, 1},
	} {
		s := Spec{Op: OpWrite, Kind: BW, Size: tt.size}.WithDefaults()
		if s.slotSize() != tt.slot || s.slots() != tt.slots {
			t.Errorf("size %d: %d slots of %d bytes, want %d of %d", tt.size, s.slots(), s.slotSize(), tt.slots, tt.slot)
		}
		if s.slots()*s.slotSize() > max(cycleBytes, s.slotSize()) {
			t.Errorf("size %d walks through more than %d bytes", tt.size, cycleBytes)
		}
	}
}

func TestParseNames(t *testing.T) {
	for m, n := range pollNames {
		if got, err := ParsePollMode(n); got != m || err != nil {
			t.Errorf("ParsePollMode(%q) = %v, %v", n, got, err)
		}
	}
	if _, err := ParsePollMode("lazy"); err == nil || !strings.Contains(err.Error(), "busy, adaptive, event") {
		t.Errorf("error %v does not list the modes", err)
	}
	if _, err := ParseAtomicOp("swap"); err == nil || !strings.Contains(err.Error(), "fadd, cas") {
		t.Errorf("error %v does not list the operations", err)
	}
	if got, err := ParseFlow("rnr"); got != FlowRNR || err != nil {
		t.Errorf("ParseFlow(rnr) = %v, %v", got, err)
	}
}

func TestPowersOfTwo(t *testing.T) {
	if got := PowersOfTwo(20); len(got) != 4 || got[0] != 2 || got[3] != 16 {
		t.Errorf("got %v", got)
	}
}
