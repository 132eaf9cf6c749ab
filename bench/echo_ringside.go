package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"

	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ringside-rdma/ringside/rpc"
	"github.com/ringside-rdma/ringside/transport"
)

// The echo method, twice: raw bytes answered on the polling goroutine, and a protobuf message answered on a worker.
const (
	rawEcho   rpc.Method = 1
	protoEcho rpc.Method = 2
)

type ringsideServerArgs struct{ Poll string }

func transportConfig(poll string) (*transport.Config, error) {
	mode, err := transport.ParsePollMode(poll)
	return &transport.Config{PollMode: mode}, err
}

func ringsideServer(raw json.RawMessage) error {
	var a ringsideServerArgs
	if err := json.Unmarshal(raw, &a); err != nil {
		return err
	}
	cfg, err := transportConfig(a.Poll)
	if err != nil {
		return err
	}
	ctx := context.Background()
	l, err := transport.Listen(ctx, net.JoinHostPort(listenHost(), "0"), cfg)
	if err != nil {
		return err
	}
	s := rpc.NewServer(nil)
	s.HandleRaw(rpc.Spec{Number: rawEcho, Inline: true}, func(c *rpc.Call, req []byte) error { return c.ReplyBytes(req) })
	rpc.HandleSpec(s, rpc.Spec{Number: protoEcho}, func(_ context.Context, in *wrapperspb.BytesValue) (*wrapperspb.BytesValue, error) {
		return &wrapperspb.BytesValue{Value: in.Value}, nil
	})
	go s.Serve(ctx, l)
	say("addr", l.Addr().String())
	if err := serveUsage(); err != nil {
		return err
	}
	return s.Close()
}

func ringsideClient(raw json.RawMessage) error {
	var a echoArgs
	if err := json.Unmarshal(raw, &a); err != nil {
		return err
	}
	cfg, err := transportConfig(a.Poll)
	if err != nil {
		return err
	}
	ctx := context.Background()
	cl, err := rpc.Dial(ctx, a.Addr, cfg, nil)
	if err != nil {
		return err
	}
	defer cl.Close()
	payload := make([]byte, a.Size)
	check := func(resp []byte) error {
		if len(resp) != a.Size {
			return fmt.Errorf("echo of %d bytes has %d", a.Size, len(resp))
		}
		return nil
	}
	call := func() error { return cl.CallRaw(ctx, rawEcho, payload, check) }
	switch {
	case a.API == "async":
		return asyncLoad(ctx, &a, cl, payload, check)
	case a.API == "proto":
		call = func() error {
			out := new(wrapperspb.BytesValue)
			if err := cl.CallMethod(ctx, protoEcho, &wrapperspb.BytesValue{Value: payload}, out); err != nil {
				return err
			}
			return check(out.Value)
		}
	case a.Rate > 0:
		return pacedLoad(&a, call)
	}
	return blockingLoad(&a, call)
}

// asyncLoad keeps a.InFlight calls in flight from one goroutine.
func asyncLoad(ctx context.Context, a *echoArgs, cl *rpc.Client, payload []byte, check func([]byte) error) error {
	ck := newClock()
	q, err := cl.NewQueue(a.InFlight)
	if err != nil {
		return err
	}
	defer q.Close()
	q.Batch = 16
	started := make([]uint64, a.InFlight) // by tag, the slot of the call
	free := make([]uint64, a.InFlight)
	for i := range free {
		free[i] = uint64(i)
	}
	var rec *recorder
	var failed error
	finish := func(tag uint64, resp []byte, err error) {
		if err == nil {
			err = check(resp)
		}
		if err != nil {
			failed = err
		}
		if rec != nil {
			rec.add(ck.now() - started[tag])
		}
		free = append(free, tag)
	}
	run := func(n int) error {
		limit := ck.limit()
		for left := n; left > 0 || q.Len() > 0; {
			for left > 0 && len(free) > 0 {
				tag := free[len(free)-1]
				free = free[:len(free)-1]
				started[tag] = ck.now()
				if err := q.Start(ctx, rawEcho, payload, tag); err != nil {
					return err
				}
				left--
			}
			if _, err := q.Wait(ctx, finish); err != nil {
				return err
			}
			if failed != nil {
				return failed
			}
			if ck.now() > limit {
				left = 0
			}
		}
		return nil
	}
	if err := run(a.Warmup); err != nil {
		return err
	}
	r := newRecorder(a.Calls)
	return measured(ck, []*recorder{r}, func() error {
		rec = r
		return run(a.Calls)
	})
}
