package wire

import (
	"reflect"
	"testing"
)

// Add leaves no counter out.
func TestCountersAdd(t *testing.T) {
	fill := func(v reflect.Value) {
		for i := range v.NumField() {
			f := v.Field(i)
			if f.Kind() == reflect.Array {
				for k := range f.Len() {
					f.Index(k).SetUint(3)
				}
				continue
			}
			f.SetUint(3)
		}
	}
	var req, reqSum RequesterCounters
	fill(reflect.ValueOf(&req).Elem())
	if reqSum.Add(&req); reqSum != req {
		t.Errorf("%+v", reqSum)
	}
	var resp, respSum ResponderCounters
	fill(reflect.ValueOf(&resp).Elem())
	if respSum.Add(&resp); respSum != resp {
		t.Errorf("%+v", respSum)
	}
	var uc, ucSum UCResponderCounters
	fill(reflect.ValueOf(&uc).Elem())
	if ucSum.Add(&uc); ucSum != uc {
		t.Errorf("%+v", ucSum)
	}
}
