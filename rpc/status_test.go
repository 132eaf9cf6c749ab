package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestCodeOf(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want Code
	}{
		{nil, OK},
		{errors.New("x"), Unknown},
		{Errorf(NotFound, "no %q", "k"), NotFound},
		{fmt.Errorf("wrapped: %w", Errorf(Aborted, "")), Aborted},
		{PermissionDenied, PermissionDenied},
		{context.Canceled, Canceled},
		{fmt.Errorf("wrapped: %w", context.DeadlineExceeded), DeadlineExceeded},
		{net.ErrClosed, Unavailable},
		{io.EOF, Unavailable},
	} {
		if got := CodeOf(tc.err); got != tc.want {
			t.Errorf("CodeOf(%v) = %v, want %v", tc.err, got, tc.want)
		}
		if tc.err != nil {
			if e := FromError(tc.err); e.Code != tc.want {
				t.Errorf("FromError(%v) = %v, want code %v", tc.err, e, tc.want)
			}
		}
	}
	if FromError(nil) != nil {
		t.Error("FromError(nil) is not nil")
	}
	if s := Code(77).String(); s != "Code(77)" {
		t.Error(s)
	}
	for c := OK; c <= maxCode; c++ {
		if c.String() == "" || c.Error() != c.String() {
			t.Errorf("code %d has no name", uint32(c))
		}
	}
}

func TestErrorIsAndAs(t *testing.T) {
	cause := fmt.Errorf("disk: %w", io.ErrUnexpectedEOF)
	err := fmt.Errorf("call: %w", Errorf(DataLoss, "read: %w", cause))
	if !errors.Is(err, DataLoss) || errors.Is(err, NotFound) {
		t.Error("matching by code")
	}
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error("the cause is not found")
	}
	if !errors.Is(err, &Error{Code: DataLoss}) || errors.Is(err, &Error{Code: DataLoss, Message: "other"}) {
		t.Error("matching by Error")
	}
	if e := Errorf(DeadlineExceeded, ""); !errors.Is(e, context.DeadlineExceeded) || errors.Is(e, context.Canceled) {
		t.Error("deadline as a context error")
	}
	if e := Errorf(Canceled, ""); !errors.Is(e, context.Canceled) {
		t.Error("cancellation as a context error")
	}
	if got, want := err.Error(), "call: rpc: DataLoss: read: disk: unexpected EOF"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestStatusRoundTrip(t *testing.T) {
	e, err := Errorf(FailedPrecondition, "try in %v", time.Second).WithDetails(durationpb.New(time.Second), wrapperspb.String("hint"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseStatus(uint32(e.Code), flagNotExecuted, appendStatus(nil, e))
	if err != nil {
		t.Fatal(err)
	}
	if got.Code != e.Code || got.Message != e.Message || !got.NotExecuted || len(got.Details) != 2 {
		t.Fatalf("%+v", got)
	}
	m, err := got.Details[0].UnmarshalNew()
	if err != nil || !proto.Equal(m, durationpb.New(time.Second)) {
		t.Fatalf("detail: %v, %v", m, err)
	}
}

func TestStatusIsBoundedAndValid(t *testing.T) {
	e := &Error{Code: Internal, Message: strings.Repeat("\xff", 10_000)}
	for range 100 {
		e, _ = e.WithDetails(wrapperspb.String(strings.Repeat("d", 300)))
	}
	b := appendStatus(nil, e)
	if len(b) > maxStatusLen {
		t.Fatalf("status of %d bytes", len(b))
	}
	got, err := parseStatus(uint32(e.Code), 0, b)
	if err != nil {
		t.Fatal(err)
	}
	if !utf8.ValidString(got.Message) || len(got.Message) == 0 || len(got.Details) == 0 {
		t.Fatalf("message of %d bytes, %d details", len(got.Message), len(got.Details))
	}
	empty := bytes.Repeat([]byte{statusFieldDetails<<3 | 2, 0}, maxStatusLen/2) // two bytes a detail
	if got, err := parseStatus(uint32(Internal), 0, empty); err != nil || len(got.Details) != maxStatusLen/2 {
		t.Errorf("the longest status: %v", err)
	}
	if _, err := parseStatus(uint32(Internal), 0, append(empty, empty[:2]...)); err == nil {
		t.Error("a status that is longer than any is taken")
	}
	if got, err := parseStatus(1000, 0, nil); err != nil || got.Code != Unknown || !strings.Contains(got.Message, "1000") {
		t.Fatalf("unknown code: %v, %v", got, err)
	}
	for _, bad := range []string{"\x12", "\x12\x05abc", "\x1a\x02\x0a\x09", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "\x0b"} {
		if _, err := parseStatus(1, 0, []byte(bad)); !errors.Is(err, errFrame) {
			t.Errorf("status %q: %v", bad, err)
		}
	}
	// Unknown fields are skipped: later versions may add some.
	if got, err := parseStatus(1, 0, []byte("\x08\x05\x12\x02ok\x22\x01z")); err != nil || got.Message != "ok" {
		t.Errorf("unknown fields: %v %v", got, err)
	}
}
